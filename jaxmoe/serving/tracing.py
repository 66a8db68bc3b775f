"""A span for every request, by OpenTelemetry, whose parent is the `traceparent` that came with it. Needs [tracing]."""

import time
from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import ConfigError
from jaxmoe.serving.metrics import Timeline


class Tracer:
    """Sends spans to an OTLP collector over HTTP, in batches, by a thread of its own.

    endpoint: of the collector, "http://127.0.0.1:4318".
    Raises ConfigError if the packages are not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"--otlp-endpoint needs OpenTelemetry ({error}); pip install 'jaxmoe[tracing]'"
            ) from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxmoe"}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxmoe")
        self._propagator = TraceContextTextMapPropagator()

    def span(
        self, carrier: Mapping[str, str], timeline: Timeline, request_id: str, model: str, reason: str
    ) -> str | None:
        """Records a request that has ended; returns the id of its trace, None if it is not sampled.

        carrier: `traceparent` and `tracestate`, as they came.
        """
        from opentelemetry.trace import SpanKind

        # The timeline is by the monotonic clock, spans are by the wall's.
        shift = time.time() - time.monotonic()

        def nanoseconds(moment: float) -> int:
            return int((moment + shift) * 1e9)

        attributes: dict[str, Any] = {
            "gen_ai.request.id": request_id,
            "gen_ai.request.model": model,
            "gen_ai.response.finish_reasons": [reason],
            "gen_ai.usage.input_tokens": timeline.prompt_tokens,
            "gen_ai.usage.output_tokens": timeline.tokens,
        }
        if timeline.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = timeline.max_tokens
        ended = timeline.ended or time.monotonic()
        attributes["gen_ai.latency.e2e"] = ended - timeline.arrived
        if timeline.started is not None:
            attributes["gen_ai.latency.time_in_queue"] = timeline.started - timeline.arrived
        if timeline.first is not None:
            attributes["gen_ai.latency.time_to_first_token"] = timeline.first - timeline.arrived
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(dict(carrier)),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=nanoseconds(timeline.arrived),
        )
        for name, moment in (("first scheduled", timeline.started), ("first token", timeline.first)):
            if moment is not None:
                span.add_event(name, timestamp=nanoseconds(moment))
        span.end(nanoseconds(ended))
        context = span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def close(self) -> None:
        """Sends what is unsent."""
        self._provider.shutdown()
