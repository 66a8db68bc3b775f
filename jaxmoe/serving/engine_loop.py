"""The engine's side of the link: receive, step, send, until the front end is gone."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from jaxmoe.engine.kv_events import KvEventBatch
from jaxmoe.engine.request import Output, Request
from jaxmoe.errors import DuplicateRequestError, InvalidRequestError, JaxmoeError, QueueFullError, UnavailableError
from jaxmoe.serving.link import (
    AskLoads,
    AskTable,
    Cancel,
    ClearPrefixCache,
    EngineLink,
    Fatal,
    KvEvents,
    LinkClosed,
    Loads,
    Outputs,
    RankLoad,
    Rejected,
    Report,
    Serving,
    Step,
    Submit,
    Table,
    Totals,
    WatchKvEvents,
)

logger = logging.getLogger(__name__)

_REPORT_INTERVAL = 1.0


class EngineRankLoad(Protocol):
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def used_pages(self) -> int: ...
    @property
    def total_pages(self) -> int: ...


class EngineStep(Protocol):
    @property
    def started(self) -> tuple[str, ...]: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def device_seconds(self) -> float: ...


class EngineCounters(Protocol):
    @property
    def preemptions(self) -> int: ...
    @property
    def programs(self) -> int: ...
    @property
    def compile_seconds(self) -> float: ...
    @property
    def late_compiles(self) -> int: ...
    @property
    def failed_steps(self) -> int: ...
    @property
    def queried_tokens(self) -> int: ...
    @property
    def hit_tokens(self) -> int: ...
    @property
    def drafts(self) -> int: ...
    @property
    def accepted_drafts(self) -> int: ...


class EngineLike(Protocol):
    """What serving asks of an engine; `jaxmoe.engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    @property
    def last_step(self) -> EngineStep: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str, index: int | None = None) -> bool: ...
    def step(self) -> list[Output]: ...
    def loads(self) -> Iterable[EngineRankLoad]: ...
    def counters(self) -> EngineCounters: ...
    def clear_prefix_cache(self) -> None: ...
    def kv_events(self) -> list[KvEventBatch]: ...


def serve_engine(
    engine: EngineLike,
    link: EngineLink,
    *,
    on_serving: Callable[[], object] = lambda: None,
    tables: Callable[[str, str], bytes] | None = None,
) -> None:
    """Runs the engine for the front end at the other end of the link; returns once that is gone.

    on_serving: called once the front end, told that the engine is ready, lets requests through.
    tables: makes a message of `jaxmoe.v1` by its name and an argument; runs in a thread beside the steps.

    A request the engine refuses is told so and disturbs nothing else. If the engine fails in any other way, the front
    end is told that it is lost, and the exception is raised.
    """
    reported, watched = 0.0, False
    try:
        link.send(_report(engine))
        while True:
            for frame in link.receive(block=not engine.has_work):
                match frame:
                    case Submit(request):
                        if rejected := _submit(engine, request):
                            link.send(rejected)
                    case Cancel(ids, index):
                        for request_id in ids:
                            engine.cancel(request_id, index)
                    case AskLoads():
                        link.send(_loads(engine))
                    case AskTable():
                        threading.Thread(target=_make_table, args=(tables, frame, link), daemon=True).start()
                    case WatchKvEvents():
                        watched = True
                    case ClearPrefixCache(number):
                        engine.clear_prefix_cache()
                        link.send(Table(number))
                    case Serving():
                        on_serving()
            if engine.has_work:
                began = time.monotonic()
                link.send(Outputs(engine.step(), _step(engine, began)))
                if began - reported > _REPORT_INTERVAL or not engine.has_work:
                    reported = began
                    link.send(_report(engine))
            if watched and (batches := engine.kv_events()):
                link.send(KvEvents(batches))
    except LinkClosed as closed:
        logger.debug("the engine stops: %s", closed)
    except Exception as error:
        with contextlib.suppress(LinkClosed):
            link.send(Fatal(f"the engine failed with {type(error).__name__}; the server's log has the details"))
            link.finish(timeout=10)
        raise


def _submit(engine: EngineLike, request: Request) -> Rejected | None:
    try:
        engine.submit(request)
    except InvalidRequestError as error:
        return Rejected(request.id, "invalid", str(error), error.field)
    except DuplicateRequestError as error:
        return Rejected(request.id, "duplicate", str(error))
    except QueueFullError as error:
        return Rejected(request.id, "queue_full", str(error))
    except JaxmoeError as error:
        return Rejected(request.id, "unavailable", str(error))
    except Exception:
        logger.exception("the engine failed to take a request")
        return Rejected(
            request.id, "internal", "the engine failed to take this request; the server's log has the details"
        )
    return None


def _make_table(tables: Callable[[str, str], bytes] | None, ask: AskTable, link: EngineLink) -> None:
    try:
        if tables is None:
            raise UnavailableError("this engine has no tables")
        answer = Table(ask.number, tables(ask.name, ask.argument))
    except InvalidRequestError as error:
        answer = Table(ask.number, kind="invalid", problem=str(error), field=error.field)
    except JaxmoeError as error:
        answer = Table(ask.number, kind="unavailable", problem=str(error))
    except Exception:
        logger.exception("the table %s could not be made", ask.name)
        answer = Table(ask.number, kind="internal", problem="the table could not be made; the server's log has details")
    with contextlib.suppress(LinkClosed):
        link.post(answer)


def _step(engine: EngineLike, began: float) -> Step:
    did = engine.last_step
    seconds = time.monotonic() - began
    return Step(began, seconds, did.device_seconds, did.started, did.prefill_tokens, did.sequences)


def _loads(engine: EngineLike) -> Loads:
    return Loads([RankLoad(rank.running, rank.waiting, rank.used_pages, rank.total_pages) for rank in engine.loads()])


def _report(engine: EngineLike) -> Report:
    now = engine.counters()
    totals = Totals(
        now.preemptions,
        now.programs,
        now.compile_seconds,
        now.late_compiles,
        now.failed_steps,
        now.queried_tokens,
        now.hit_tokens,
        now.drafts,
        now.accepted_drafts,
    )
    return Report(_loads(engine).ranks, totals)
