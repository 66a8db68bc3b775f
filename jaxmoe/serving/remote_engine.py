"""The engine as the front end sees it: the requests that it works on, and whether it serves.

Runs on one event loop. Imports neither jax nor grpc.
"""

import asyncio
import contextlib
import enum
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence

from jaxmoe.engine.request import Output, Request, SamplingParams
from jaxmoe.errors import CheckpointError, DuplicateRequestError, QueueFullError, UnavailableError
from jaxmoe.serving.kv_log import KvLog, Told
from jaxmoe.serving.link import (
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
    ToFrontend,
    WatchKvEvents,
)
from jaxmoe.serving.metrics import Metrics
from jaxmoe.serving.questions import Questions
from jaxmoe.serving.rejections import EngineFailedError, exception
from jaxmoe.serving.request_log import Caller, SpanRecorder, tell_ended
from jaxmoe.serving.streams import Stream
from jaxmoe.serving.tokenization import AnswerText, Tokenizer, read_files

logger = logging.getLogger(__name__)


WOKEN_TOGETHER = 16  # less than a millisecond of writing


class Phase(enum.Enum):
    STARTING = "starting"
    SERVING = "serving"
    STALLED = "stalled"
    DRAINING = "draining"
    ENDED = "ended"


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
        self._questions = Questions(lambda frame: self.link.send(frame))
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
        self._to_wake: dict[Stream, None] = {}  # in order; what comes meanwhile is read together
        self._waking = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.last_word = time.monotonic()
        self._reported: tuple[list[RankLoad], float] = ([], self.last_word)
        self._kv_log: KvLog | None = None
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
            name = "" if self._info is None else self._info.served_model_name
            tell_ended(stream, caller, self.metrics, self.tracer, name)
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
            stream.expect_reader(self._read_timeout)
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
        self._check_ready()
        return await self._questions.loads()

    async def table(self, name: str, argument: str = "") -> bytes:
        """A message of `jaxmoe.v1`, serialized, that the engine's process makes; that may take it seconds."""
        self._check_ready()
        return await self._questions.ask(lambda number: AskTable(number, name, argument))

    async def order(self, name: str, content: bytes) -> bytes:
        """What the engine answers to a message; it does so between two steps."""
        self._check_ready()
        return await self._questions.ask(lambda number: Order(number, name, content))

    async def clear_prefix_cache(self, timeout: float) -> bool:
        """Waits so many seconds until no request is open; whether the cache was cleared then."""
        if self._open:
            try:
                await asyncio.wait_for(self._idle.wait(), timeout)
            except TimeoutError:
                return False
        self._check_ready()
        await self._questions.ask(ClearPrefixCache)
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
            before = time.monotonic()
            await asyncio.sleep(self._step_timeout / 8)
            if time.monotonic() - before > self._step_timeout / 2:
                # This process was held up, and so was the engine's: a machine or a group of processes that was stopped.
                self.last_word = time.monotonic()
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
            case Rejected(key, why):
                if stream := self._live.pop(key, None):
                    stream.fail(exception(why))
            case Loads() | Table():
                self._questions.answered(frame)
            case KvEvents(batches):
                if self._kv_log is not None:
                    self._kv_log.take(batches)
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
                self._to_wake[stream] = None
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
        if not self._waking:
            self._wake_some()

    def _wake_some(self) -> None:
        """Lets a few readers write, and the others after whatever else has come by then.

        Who asks for something, and be it in vain, does not wait until hundreds of streams have been written.
        """
        for stream in list(itertools.islice(self._to_wake, WOKEN_TOGETHER)):
            del self._to_wake[stream]
            stream.wake()
        self._waking = bool(self._to_wake)
        if self._waking:
            asyncio.get_running_loop().call_soon(self._wake_some)

    def _withdraw(self, streams: Iterable[Stream]) -> None:
        """The engine need not work on these any longer."""
        keys = [stream.key for stream in streams if self._live.pop(stream.key, None)]
        if keys:
            self.link.send(Cancel(keys))

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
            stream.expect_reader(self._read_timeout)
        self._withdraw(list(self._live.values()))
        self._questions.fail(error)

    def _check_ready(self) -> None:
        if self._info is None or self.phase is Phase.ENDED:
            raise UnavailableError(self.reason)

    def _turn(self, phase: Phase, reason: str) -> None:
        self.phase, self.reason = phase, reason
        self.phase_changed.set()
        if phase is Phase.ENDED:
            self.ended.set()
            if self._kv_log is not None:
                self._kv_log.changed.set()
