"""The engine's side of the link: receive, step, send, until the front end is gone."""

import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from jaxmoe.engine.kv_events import KvEventBatch
from jaxmoe.engine.request import Output, Request
from jaxmoe.errors import JaxmoeError, UnavailableError
from jaxmoe.serving.link import (
    AskLoads,
    AskTable,
    Balance,
    Cancel,
    ClearPrefixCache,
    EngineLink,
    Fatal,
    KvEvents,
    LinkClosed,
    Loads,
    Moves,
    Order,
    Outputs,
    RankLoad,
    Rejected,
    Rejection,
    Report,
    Serving,
    Step,
    Submit,
    Table,
    Totals,
    WatchKvEvents,
)
from jaxmoe.serving.rejections import rejection

logger = logging.getLogger(__name__)

_REPORT_INTERVAL = 1.0
_PACE_WINDOW = 10.0


class EngineRankLoad(Protocol):
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def used_pages(self) -> int: ...
    @property
    def total_pages(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def queried_tokens(self) -> int: ...
    @property
    def hit_tokens(self) -> int: ...


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


class EngineBalance(Protocol):
    @property
    def balancedness(self) -> float: ...
    @property
    def ceiling(self) -> float: ...
    @property
    def of_ceiling(self) -> float: ...
    @property
    def worst_layer(self) -> int: ...
    @property
    def worst_balancedness(self) -> float: ...


class EngineStatistics(Protocol):
    def report(self) -> EngineBalance | None: ...


class EngineRebalance(Protocol):
    @property
    def outcome(self) -> str: ...
    @property
    def worst_step_seconds(self) -> float: ...
    @property
    def worst_moving_seconds(self) -> float: ...


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
    @property
    def statistics(self) -> EngineStatistics: ...
    @property
    def rebalances(self) -> tuple[int, int, int, int, int]: ...
    @property
    def last_rebalance(self) -> EngineRebalance | None: ...


def serve_engine(
    engine: EngineLike,
    link: EngineLink,
    *,
    on_serving: Callable[[], object] = lambda: None,
    tables: Callable[[str, str], bytes] | None = None,
    orders: Callable[[str, bytes], bytes] | None = None,
) -> None:
    """Runs the engine for the front end at the other end of the link; returns once that is gone.

    on_serving: called once the front end, told that the engine is ready, lets requests through.
    tables: makes a message of `jaxmoe.v1` by its name and an argument; runs in a thread beside the steps.
    orders: carries out a request, a message by its name and content, between two steps.

    A request the engine refuses is told so and disturbs nothing else. If the engine fails in any other way, the front
    end is told that it is lost, and the exception is raised.
    """
    reported, watched, pace = 0.0, False, _Pace()
    try:
        link.send(_report(engine, pace))
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
                        link.send(Loads(_loads(engine, pace)))
                    case AskTable():
                        threading.Thread(target=_make_table, args=(tables, frame, link), daemon=True).start()
                    case Order(number, name, content):
                        link.send(_answer(number, name, orders and functools.partial(orders, name, content)))
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
                    link.send(_report(engine, pace))
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
    except JaxmoeError as error:
        return Rejected(request.id, rejection(error))
    except Exception:
        logger.exception("the engine failed to take a request")
        text = "the engine failed to take this request; the server's log has the details"
        return Rejected(request.id, Rejection("internal", text))
    return None


def _make_table(tables: Callable[[str, str], bytes] | None, ask: AskTable, link: EngineLink) -> None:
    answer = _answer(ask.number, ask.name, tables and functools.partial(tables, ask.name, ask.argument))
    with contextlib.suppress(LinkClosed):
        link.post(answer)


def _answer(number: int, name: str, make: Callable[[], bytes] | None) -> Table:
    """What `make` makes, or why it cannot."""
    try:
        if make is None:
            raise UnavailableError("this engine has no such tables")
        return Table(number, make())
    except JaxmoeError as error:
        return Table(number, problem=rejection(error))
    except Exception:
        logger.exception("the answer to %s could not be made", name)
        text = "the answer could not be made; the server's log has the details"
        return Table(number, problem=Rejection("internal", text))


class _Pace:
    """Tokens a second that each rank generated within the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Sequence[int]]] = deque()

    def rates(self, generated: Sequence[int]) -> list[float]:
        """generated: by each rank since its start, now."""
        now = time.monotonic()
        if not self._seen or now - self._seen[-1][0] > _REPORT_INTERVAL / 2:
            self._seen.append((now, generated))
        while len(self._seen) > 1 and self._seen[1][0] < now - _PACE_WINDOW:
            self._seen.popleft()
        then, before = self._seen[0]
        seconds = max(now - then, 1e-3)
        return [(count - earlier) / seconds for count, earlier in zip(generated, before, strict=True)]


def _step(engine: EngineLike, began: float) -> Step:
    did = engine.last_step
    seconds = time.monotonic() - began
    return Step(began, seconds, did.device_seconds, did.started, did.prefill_tokens, did.sequences)


def _loads(engine: EngineLike, pace: _Pace) -> list[RankLoad]:
    ranks = list(engine.loads())
    rates = pace.rates([rank.generated_tokens for rank in ranks])
    return [
        RankLoad(
            rank.running,
            rank.waiting,
            rank.used_pages,
            rank.total_pages,
            rate,
            rank.hit_tokens / max(1, rank.queried_tokens),
        )
        for rank, rate in zip(ranks, rates, strict=True)
    ]


def _report(engine: EngineLike, pace: _Pace) -> Report:
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
    return Report(_loads(engine, pace), totals, _balance(engine), _moves(engine))


def _balance(engine: EngineLike) -> Balance | None:
    told = engine.statistics.report()
    if told is None:
        return None
    return Balance(told.balancedness, told.ceiling, told.of_ceiling, told.worst_layer, told.worst_balancedness)


def _moves(engine: EngineLike) -> Moves:
    latest = engine.last_rebalance
    if latest is None:
        return Moves()
    running = latest.outcome == "running"
    return Moves(*engine.rebalances, running, latest.worst_step_seconds, latest.worst_moving_seconds)
