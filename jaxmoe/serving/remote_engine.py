"""The engine as the front end sees it: live requests, their streams of tokens, and whether it serves.

Runs on one event loop. Imports neither jax nor grpc.
"""

import asyncio
import contextlib
import enum
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from jaxmoe.engine.request import Output, PromptLogprobs, Request, RoutedExperts, SamplingParams, TopLogprobs
from jaxmoe.errors import (
    CheckpointError,
    ConfigError,
    DuplicateRequestError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from jaxmoe.serving.kv_log import KvLog, Told
from jaxmoe.serving.link import (
    AskLoads,
    AskTable,
    Cancel,
    ClearPrefixCache,
    Fatal,
    FrontendLink,
    KvEvents,
    Loads,
    ModelInfo,
    Order,
    Outputs,
    Progress,
    RankLoad,
    Ready,
    Rejected,
    Report,
    Serving,
    Step,
    Submit,
    Table,
    ToEngine,
    ToFrontend,
    WatchKvEvents,
)
from jaxmoe.serving.logs import fields
from jaxmoe.serving.metrics import Metrics, Timeline
from jaxmoe.serving.tokenization import AnswerText, Tokenizer, read_files

logger = logging.getLogger(__name__)

_LOADS_TIMEOUT = 5.0


class EngineFailedError(Exception):
    """The engine failed while it worked on a request."""


class SlowReaderError(Exception):
    """A client reads its stream more slowly than tokens come, and too many wait for it."""


class Phase(enum.Enum):
    STARTING = "starting"
    SERVING = "serving"
    STALLED = "stalled"
    DRAINING = "draining"
    ENDED = "ended"


class Caller(NamedTuple):
    """Who sent a request. key: what tells callers apart. trace: the headers by which it takes part in a trace."""

    key: str = ""
    trace: Mapping[str, str] = {}


class SpanRecorder(Protocol):
    """Records requests that have ended; `jaxmoe.serving.tracing.Tracer` is one."""

    def span(
        self, carrier: Mapping[str, str], timeline: Timeline, request_id: str, model: str, reason: str
    ) -> str | None: ...


class Finish(NamedTuple):
    """Why a stream ended: reason is "stop", "length" or "abort"; the rest says what stopped it."""

    reason: str
    stop_token: int | None = None
    stop_string: str | None = None


class Piece(NamedTuple):
    """What came of one sample since its last piece; see `jaxmoe.engine.request.Output`. finish: set on the last one."""

    sample: int
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    prompt_logprobs: PromptLogprobs | None
    routed: RoutedExperts | None
    finish: Finish | None


class Sample:
    """What came of one sample of an answer and has not been read. answer: finds stop strings, if there are any."""

    def __init__(self, answer: AnswerText | None) -> None:
        self._answer = answer
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.prompt: PromptLogprobs | None = None
        self.routed: RoutedExperts | None = None
        self.finish: Finish | None = None

    def push(self, output: Output) -> None:
        count = len(output.token_ids)
        if output.finish_reason is not None:
            self.finish = Finish(output.finish_reason, output.stop_token)
        if self._answer is not None:
            for n, token in enumerate(output.token_ids, 1):
                self._answer.push([token])
                if self._answer.stopped:
                    count, self.finish = n, Finish("stop", stop_string=self._answer.stop_string)
                    break
        self.tokens += output.token_ids[:count]
        self.logprobs += output.logprobs[:count]
        self.top += output.top_logprobs[:count]
        if output.prompt_logprobs is not None:
            self.prompt = output.prompt_logprobs
        if output.routed_experts is not None:
            self._add_routed(output.routed_experts, len(output.token_ids) - count)

    def _add_routed(self, told: RoutedExperts, over: int) -> None:
        """over: tokens that came after a stop string."""
        experts = told.experts[: len(told.experts) - 2 * told.layers * told.k * over]
        before = self.routed
        self.routed = (
            told._replace(experts=experts) if before is None else before._replace(experts=before.experts + experts)
        )

    def take(self, index: int) -> Piece:
        piece = Piece(index, self.tokens, self.logprobs, self.top, self.prompt, self.routed, self.finish)
        self.tokens, self.logprobs, self.top, self.prompt, self.routed = [], [], [], None, None
        return piece


class Stream:
    """One request's tokens on their way to its reader.

    answers: one for each sample. Stop strings end it, with the token that completes the first of them.
    max_backlog: fails with SlowReaderError once more tokens than this wait to be read; None for no limit.
    """

    def __init__(
        self,
        request_id: str,
        key: str,
        *,
        answers: Sequence[AnswerText | None] = (None,),
        max_backlog: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.key = key  # its name at the engine
        self.rank: int | None = None  # that it is pinned to
        self.timeline = Timeline(time.monotonic())
        self._samples = [Sample(answer) for answer in answers]
        self._unread: dict[int, None] = {}  # samples of which something waits to be read, in order
        self._max_backlog = max_backlog
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._scope: asyncio.Timeout | None = None
        self._patience: asyncio.TimerHandle | None = None

    @property
    def reason(self) -> str:
        """Why it ended: one of `metrics.REASONS`; "abort" if its reader left before."""
        if self._error is not None:
            return "error"
        finish = self._samples[-1].finish
        return finish.reason if finish is not None else "abort"

    @property
    def finished(self) -> bool:
        """All samples have come to their ends."""
        return all(sample.finish is not None for sample in self._samples)

    @property
    def ended(self) -> bool:
        return self._error is not None or self.finished

    def push(self, output: Output) -> bool:
        """Whether this ends the sample although the engine would go on with it."""
        sample = self._samples[output.index]
        if self._error is not None or sample.finish is not None:
            return False
        sample.push(output)
        self._unread[output.index] = None
        waiting = sum(len(each.tokens) for each in self._samples)
        if self._max_backlog is not None and waiting > self._max_backlog:
            self._cut(f"{waiting} tokens of this stream wait to be read; read faster, or do not stream")
        self._news.set()
        return sample.finish is not None and output.finish_reason is None

    def abort(self) -> None:
        for index, sample in enumerate(self._samples):
            if sample.finish is None:
                sample.finish = Finish("abort")
                self._unread[index] = None
        self._news.set()

    def fail(self, error: Exception) -> None:
        if not self.ended:
            self._error = error
            self._news.set()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Breaks off what the block does, a write that waits for the client too, once its client is too slow a reader.

        Raises SlowReaderError then.
        """
        try:
            async with asyncio.timeout(None) as self._scope:
                yield
        except TimeoutError:
            assert self._error is not None
            raise self._error from None
        finally:
            self._scope = None
            if self._patience is not None:
                self._patience.cancel()

    def expect_reader(self, seconds: float) -> None:
        """It has ended: what is left of it is to be read within this time."""
        if self._scope is not None and self._error is None:
            text = f"this answer has not been read within {seconds:g} s of its end; read faster"
            self._patience = asyncio.get_running_loop().call_later(seconds, self._cut, text)

    def _cut(self, text: str) -> None:
        self._error = SlowReaderError(text)
        for index, sample in enumerate(self._samples):
            sample.take(index)
        if self._scope is not None:
            self._scope.reschedule(0)

    async def read(self) -> Piece:
        """Waits until something has come. Raises the error that ended the stream, if one did."""
        while not self._unread and self._error is None:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        index = next(iter(self._unread))
        del self._unread[index]
        return self._samples[index].take(index)


class RemoteEngine:
    """Requests go out over `link` and their tokens come in.

    max_backlog: tokens that may wait for the reader of one stream.
    step_timeout: seconds without word from an engine that has work, after which its requests fail and it counts as
        stalled until it is heard of again.
    read_timeout: seconds that a client has to read the rest of an answer once it has ended.
    max_client_requests: that one caller may have open at once; 0 for no limit.
    last_word: when the engine was last heard of, by the monotonic clock.
    """

    def __init__(
        self,
        *,
        step_timeout: float,
        max_backlog: int,
        read_timeout: float = 60.0,
        max_client_requests: int = 0,
    ) -> None:
        self.link = FrontendLink(self._receive, self._lost)
        self.phase = Phase.STARTING
        self.reason = "starting: the model is being loaded"
        self.phase_changed = asyncio.Event()
        self.ended = asyncio.Event()
        self.tokenizer: Tokenizer | None = None
        self.tokenizer_files: dict[str, bytes] = {}
        self.tokenizer_problem = ""
        self._info: ModelInfo | None = None
        self._step_timeout = step_timeout
        self._max_backlog = max_backlog
        self._read_timeout = read_timeout
        self._max_client_requests = max_client_requests
        self.tracer: SpanRecorder | None = None
        self.metrics = Metrics()
        self.metrics.follow(lambda: (self.phase.value, self.phase is Phase.SERVING), self.unplaced)
        self._by_caller: Counter[str] = Counter()
        self._open: dict[str, Stream] = {}  # by the client's id
        self._live: dict[str, Stream] = {}  # by key; the engine works on them
        self._keys = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self.last_word = time.monotonic()
        self._reported: tuple[list[RankLoad], float] = ([], self.last_word)
        self._loads: asyncio.Future[list[RankLoad]] | None = None
        self._kv_log: KvLog | None = None
        self._tables: dict[int, asyncio.Future[bytes]] = {}
        self._loading: asyncio.Task[None] | None = None

    @property
    def info(self) -> ModelInfo:
        """Raises UnavailableError until the engine is ready."""
        if self._info is None:
            raise UnavailableError(self.reason)
        return self._info

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def unplaced(self, ranks: Sequence[RankLoad]) -> int:
        """Requests that wait for whichever rank has a place first."""
        return max(0, len(self._live) - sum(rank.running + rank.waiting for rank in ranks))

    @contextlib.contextmanager
    def open(
        self,
        request_id: str,
        *,
        streams: bool,
        answers: Sequence[AnswerText | None] = (None,),
        caller: Caller = Caller(),  # noqa: B008 - immutable
    ) -> Iterator[Stream]:
        """A stream for a request to come, whose id is taken until the end of the block; by then the engine has left it.

        Raises UnavailableError, DuplicateRequestError, and QueueFullError if the engine is sure to refuse it or its
        caller has as many open as it may.
        """
        if self.phase is not Phase.SERVING:
            raise UnavailableError(self.reason)
        if request_id in self._open:
            raise DuplicateRequestError(
                f"a request with id {request_id!r} is live; use another id, or wait for its end"
            )
        if self.info.max_running and len(self._live) >= self.info.max_running + self.info.max_queue:
            raise QueueFullError(f"{self.info.max_queue} requests wait already (max_queue); try again later")
        if 0 < self._max_client_requests <= self._by_caller[caller.key]:
            raise QueueFullError(
                f"{self._max_client_requests} requests of this client are open already (max_client_requests); "
                "try again when one has ended"
            )
        max_backlog = self._max_backlog if streams else None
        stream = Stream(request_id, str(next(self._keys)), answers=answers, max_backlog=max_backlog)
        self._open[request_id] = stream
        self._by_caller[caller.key] += 1
        self._idle.clear()
        try:
            yield stream
        finally:
            self._withdraw([stream])
            del self._open[request_id]
            self._by_caller[caller.key] -= 1
            if not self._by_caller[caller.key]:
                del self._by_caller[caller.key]
            self._record(stream, caller)
            if not self._open:
                self._idle.set()

    def submit(self, stream: Stream, prompt: Sequence[int], params: SamplingParams, rank: int | None) -> None:
        """Sends a request to the engine, unless its stream has ended already."""
        if stream.ended:
            return
        if not self._live:
            self.last_word = time.monotonic()
        timeline = stream.timeline
        timeline.prompt_tokens, timeline.max_tokens, timeline.samples = len(prompt), params.max_tokens, params.n
        stream.rank = rank
        self._live[stream.key] = stream
        self.link.send(Submit(Request(stream.key, tuple(prompt), params, rank)))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends those of the requests that are live, with finish reason "abort"."""
        streams = [self._open[request_id] for request_id in request_ids if request_id in self._open]
        for stream in streams:
            stream.abort()
        self._withdraw(streams)

    def waiting_tokens(self, num_ranks: int) -> list[int]:
        """Prompt tokens of requests that have not begun, by rank; of those pinned to none, an even share.

        What the prefix cache holds of them is known once they begin.
        """
        tokens, unpinned = [0] * num_ranks, 0
        for stream in self._live.values():
            if stream.timeline.started is None:
                if stream.rank is None:
                    unpinned += stream.timeline.prompt_tokens
                else:
                    tokens[stream.rank] += stream.timeline.prompt_tokens
        return [count + (unpinned + num_ranks - 1 - rank) // num_ranks for rank, count in enumerate(tokens)]

    @property
    def prefilling_tokens(self) -> int:
        """Prompt tokens of requests of which nothing has come yet."""
        streams = self._live.values()
        return sum(stream.timeline.prompt_tokens for stream in streams if stream.timeline.first is None)

    @property
    def reported(self) -> tuple[list[RankLoad], float]:
        """What the engine last said of its ranks, and how many seconds ago; 0 if nothing has happened since."""
        ranks, said = self._reported
        return ranks, time.monotonic() - said if self._live else 0.0

    @property
    def silence(self) -> float | None:
        """Seconds without word from an engine that has work; None if it has none."""
        return time.monotonic() - self.last_word if self._live else None

    async def loads(self) -> list[RankLoad]:
        """What each attention rank carries now. Raises UnavailableError if the engine does not say."""
        if self._info is None or self.phase is Phase.ENDED:
            raise UnavailableError(self.reason)
        if self._loads is None:
            self._loads = asyncio.get_running_loop().create_future()
            self.link.send(AskLoads())
        try:
            return await asyncio.wait_for(asyncio.shield(self._loads), _LOADS_TIMEOUT)
        except TimeoutError:
            raise UnavailableError(f"the engine has not reported its loads within {_LOADS_TIMEOUT:g} s") from None

    async def table(self, name: str, argument: str = "") -> bytes:
        """A message of `jaxmoe.v1`, serialized, that the engine's process makes; that may take it seconds."""
        return await self._answered(lambda number: AskTable(number, name, argument))

    async def order(self, name: str, content: bytes) -> bytes:
        """What the engine answers to a message; it does so between two steps."""
        return await self._answered(lambda number: Order(number, name, content))

    async def clear_prefix_cache(self, timeout: float) -> bool:
        """Waits so many seconds until no request is open; whether the cache was cleared then."""
        if self._open:
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except TimeoutError:
                return False
        await self._answered(ClearPrefixCache)
        return True

    async def kv_events(self, start: int, pause: float) -> AsyncGenerator[Told | None, None]:
        """What happens in the prefix caches, from this number on, or from their state. Ends when the engine does.

        None when nothing has for so many seconds.
        """
        if self._kv_log is None:
            self._kv_log = KvLog(self.info.num_ranks)
            self.link.send(WatchKvEvents())
        log = self._kv_log
        batches, place = log.begin(start)
        while self.phase is not Phase.ENDED:
            for told in batches:
                yield told
            log.changed.clear()
            # What came while these were told is there already; the event is shared, and another may have cleared it.
            batches, place = log.after(place)
            if not batches and not self.ended.is_set():
                try:
                    await asyncio.wait_for(log.changed.wait(), pause)
                except TimeoutError:
                    yield None

    async def _answered(self, ask: Callable[[int], ToEngine]) -> bytes:
        """What the engine answers to a frame with a number."""
        if self._info is None or self.phase is Phase.ENDED:
            raise UnavailableError(self.reason)
        number = next(self._keys)
        self._tables[number] = asyncio.get_running_loop().create_future()
        self.link.send(ask(number))
        try:
            return await self._tables[number]
        finally:
            del self._tables[number]

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, and returns when none is open or `timeout` seconds have passed."""
        self._turn(Phase.DRAINING, "draining: this server is shutting down")
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            logger.warning("%d requests had not ended after %g s of draining", len(self._open), timeout)

    async def end(self, error: Exception) -> None:
        """Fails all requests and waits a moment for their readers to be told."""
        if self.phase is not Phase.ENDED:
            self._turn(Phase.ENDED, str(error))
        self._fail_all(error)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout=2.0)

    async def watch(self) -> None:
        """Never returns: looks after the step timeout."""
        while True:
            await asyncio.sleep(self._step_timeout / 8)
            if self._live and time.monotonic() - self.last_word > self._step_timeout:
                self.metrics.stalled()
                reason = f"the engine has not finished a step in {self._step_timeout:g} s"
                logger.error("%s; its %d requests fail", reason, len(self._live))
                if self.phase is Phase.SERVING:
                    self._turn(Phase.STALLED, reason)
                self._fail_all(UnavailableError(reason))

    def _receive(self, frame: ToFrontend) -> None:
        self.last_word = time.monotonic()
        if self.phase is Phase.STALLED:
            self._turn(Phase.SERVING, "serving")
        match frame:
            case Outputs(outputs, step):
                self._deliver(outputs, step)
            case Report(ranks):
                self._reported = (ranks, self.last_word)
                self.metrics.report(frame)
            case Rejected(key, kind, message, field):
                if stream := self._live.pop(key, None):
                    stream.fail(_rejection(kind, message, field))
            case Loads(ranks):
                if self._loads is not None and not self._loads.done():
                    self._loads.set_result(ranks)
                self._loads = None
            case KvEvents(batches):
                if self._kv_log is not None:
                    self._kv_log.take(batches)
            case Table(number, content, kind, problem, field):
                asked = self._tables.get(number)
                if asked is not None and not asked.done():
                    if kind is None:
                        asked.set_result(content)
                    else:
                        asked.set_exception(_rejection(kind, problem, field))
            case Progress(text):
                self._turn(self.phase, f"starting: {text}")
            case Ready(info):
                self._loading = asyncio.get_running_loop().create_task(self._begin(info))
            case Fatal(message):
                self._turn(Phase.ENDED, message)
                self._fail_all(EngineFailedError(message))

    def _deliver(self, outputs: Sequence[Output], step: Step | None) -> None:
        if step is not None:
            self.metrics.step(step, sum(len(output.token_ids) for output in outputs))
            for key in step.started:
                if stream := self._live.get(key):
                    stream.timeline.started = step.began
        stopped, now = [], self.last_word
        for output in outputs:
            stream = self._live.get(output.request_id)
            if stream is None:  # withdrawn; the engine did not know yet
                continue
            stopped_early = False
            if output.finish_reason == "error":
                stream.fail(EngineFailedError(output.error))
            else:
                stopped_early = stream.push(output)
            stream.timeline.cached_tokens = max(stream.timeline.cached_tokens, output.cached_tokens)
            self.metrics.tokens(stream.timeline, len(output.token_ids), now)
            if stream.ended:
                stream.timeline.ended = now
                stream.expect_reader(self._read_timeout)
            if stream.finished and output.finish_reason is not None:
                del self._live[output.request_id]
            elif stream.ended:
                stopped.append(stream)
            elif stopped_early:
                self.link.send(Cancel([stream.key], output.index))
        self._withdraw(stopped)

    def _withdraw(self, streams: Iterable[Stream]) -> None:
        """The engine need not work on these any longer."""
        keys = [stream.key for stream in streams if self._live.pop(stream.key, None)]
        if keys:
            self.link.send(Cancel(keys))

    def _record(self, stream: Stream, caller: Caller) -> None:
        """Tells metrics, traces and the log that a request has ended."""
        timeline, reason, trace = stream.timeline, stream.reason, None
        if timeline.ended is None:
            timeline.ended = time.monotonic()
        self.metrics.ended(timeline, reason)
        if self.tracer is not None and self._info is not None:
            name = self._info.served_model_name
            trace = self.tracer.span(caller.trace, timeline, stream.request_id, name, reason)
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

    async def _begin(self, info: ModelInfo) -> None:
        try:
            self.tokenizer_files = await asyncio.to_thread(read_files, info.model_path)
            self.tokenizer = await asyncio.to_thread(Tokenizer, self.tokenizer_files)
        except (CheckpointError, OSError) as error:
            self.tokenizer_problem = str(error)
            logger.warning("only token ids can be served, no text: %s", error)
        self._info = info
        self.metrics.begin(info)
        if self.phase is Phase.STARTING:
            self._turn(Phase.SERVING, "serving")
            self.link.send(Serving())

    def _lost(self) -> None:
        if self.phase is not Phase.ENDED:
            self._turn(Phase.ENDED, "the engine's process is gone")
            self._fail_all(UnavailableError(self.reason))

    def _fail_all(self, error: Exception) -> None:
        for stream in self._open.values():
            stream.fail(error)
        self._withdraw(list(self._live.values()))
        if self._loads is not None and not self._loads.done():
            self._loads.set_exception(error)
            self._loads.exception()  # asked for, lest it be logged where nobody waits

        for asked in self._tables.values():
            if not asked.done():
                asked.set_exception(error)

    def _turn(self, phase: Phase, reason: str) -> None:
        self.phase, self.reason = phase, reason
        self.phase_changed.set()
        if phase is Phase.ENDED:
            self.ended.set()
            if self._kv_log is not None:
                self._kv_log.changed.set()


def _rejection(kind: str, message: str, field: str) -> Exception:
    match kind:
        case "invalid":
            return InvalidRequestError(message, field)
        case "precondition":
            return ConfigError(message)
        case "duplicate":
            return DuplicateRequestError(message)
        case "queue_full":
            return QueueFullError(message)
        case "unavailable":
            return UnavailableError(message)
    return EngineFailedError(message)
