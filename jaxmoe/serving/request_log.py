"""What is told of a request that has ended: to metrics, to a trace, to the log. Imports neither jax nor grpc."""

import logging
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from jaxmoe.serving.logs import fields
from jaxmoe.serving.metrics import Metrics, Timeline
from jaxmoe.serving.streams import Stream

logger = logging.getLogger(__name__)


class Caller(NamedTuple):
    """Who sent a request. key: what tells callers apart. trace: the headers by which it takes part in a trace."""

    key: str = ""
    trace: Mapping[str, str] = {}


class SpanRecorder(Protocol):
    """Records requests that have ended; `jaxmoe.serving.tracing.Tracer` is one."""

    def span(
        self, carrier: Mapping[str, str], timeline: Timeline, request_id: str, model: str, reason: str
    ) -> str | None: ...


def tell_ended(stream: Stream, caller: Caller, metrics: Metrics, tracer: SpanRecorder | None, model: str) -> None:
    """model: the name that is served."""
    timeline, reason = stream.timeline, stream.reason
    if timeline.ended is None:
        timeline.ended = time.monotonic()
    metrics.ended(timeline, reason)
    trace = tracer.span(caller.trace, timeline, stream.request_id, model, reason) if tracer is not None else None
    if logger.isEnabledFor(logging.INFO):
        first = None if timeline.first is None else round(timeline.first - timeline.arrived, 6)
        told = fields(
            request_id=stream.request_id,
            trace_id=trace,
            finish_reason=reason,
            prompt_tokens=timeline.prompt_tokens,
            cached_tokens=timeline.cached_tokens,
            completion_tokens=timeline.tokens,
            time_to_first_token=first,
            seconds=round(timeline.ended - timeline.arrived, 6),
        )
        logger.info("request ended", extra=told)
