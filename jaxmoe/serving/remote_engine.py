"""The engine as the front end sees it: live requests, their streams of tokens, and whether it serves.

Runs on one event loop. Imports neither jax nor grpc.
"""

import asyncio
import contextlib
import enum
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxmoe.engine.request import Output, PromptLogprobs, Request, SamplingParams, TopLogprobs
from jaxmoe.errors import (
    CheckpointError,
    DuplicateRequestError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from jaxmoe.serving.link import (
    AskLoads,
    Cancel,
    Fatal,
    FrontendLink,
    Loads,
    ModelInfo,
    Outputs,
    Progress,
    RankLoad,
    Ready,
    Rejected,
    Serving,
    Submit,
    ToFrontend,
)
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
    finish: Finish | None


class Sample:
    """What came of one sample of an answer and has not been read. answer: finds stop strings, if there are any."""

    def __init__(self, answer: AnswerText | None) -> None:
        self._answer = answer
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.prompt: PromptLogprobs | None = None
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

    def take(self, index: int) -> Piece:
        piece = Piece(index, self.tokens, self.logprobs, self.top, self.prompt, self.finish)
        self.tokens, self.logprobs, self.top, self.prompt = [], [], [], None
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
        self._samples = [Sample(answer) for answer in answers]
        self._unread: dict[int, None] = {}  # samples of which something waits to be read, in order
        self._max_backlog = max_backlog
        self._error: Exception | None = None
        self._news = asyncio.Event()

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
            self._error = SlowReaderError(
                f"{waiting} tokens of this stream wait to be read; read faster, or do not stream"
            )
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
    """

    def __init__(self, *, step_timeout: float, max_backlog: int) -> None:
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
        self._open: dict[str, Stream] = {}  # by the client's id
        self._live: dict[str, Stream] = {}  # by key; the engine works on them
        self._keys = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_word = time.monotonic()
        self._loads: asyncio.Future[list[RankLoad]] | None = None
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

    @contextlib.contextmanager
    def open(
        self, request_id: str, *, streams: bool, answers: Sequence[AnswerText | None] = (None,)
    ) -> Iterator[Stream]:
        """A stream for a request to come, whose id is taken until the end of the block; by then the engine has left it.

        Raises UnavailableError, DuplicateRequestError, and QueueFullError if the engine is sure to refuse it.
        """
        if self.phase is not Phase.SERVING:
            raise UnavailableError(self.reason)
        if request_id in self._open:
            raise DuplicateRequestError(
                f"a request with id {request_id!r} is live; use another id, or wait for its end"
            )
        if self.info.max_running and len(self._live) >= self.info.max_running + self.info.max_queue:
            raise QueueFullError(f"{self.info.max_queue} requests wait already (max_queue); try again later")
        max_backlog = self._max_backlog if streams else None
        stream = Stream(request_id, str(next(self._keys)), answers=answers, max_backlog=max_backlog)
        self._open[request_id] = stream
        self._idle.clear()
        try:
            yield stream
        finally:
            self._withdraw([stream])
            del self._open[request_id]
            if not self._open:
                self._idle.set()

    def submit(self, stream: Stream, prompt: Sequence[int], params: SamplingParams, rank: int | None) -> None:
        """Sends a request to the engine, unless its stream has ended already."""
        if stream.ended:
            return
        if not self._live:
            self._last_word = time.monotonic()
        self._live[stream.key] = stream
        self.link.send(Submit(Request(stream.key, tuple(prompt), params, rank)))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends those of the requests that are live, with finish reason "abort"."""
        streams = [self._open[request_id] for request_id in request_ids if request_id in self._open]
        for stream in streams:
            stream.abort()
        self._withdraw(streams)

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
            if self._live and time.monotonic() - self._last_word > self._step_timeout:
                reason = f"the engine has not finished a step in {self._step_timeout:g} s"
                logger.error("%s; its %d requests fail", reason, len(self._live))
                if self.phase is Phase.SERVING:
                    self._turn(Phase.STALLED, reason)
                self._fail_all(UnavailableError(reason))

    def _receive(self, frame: ToFrontend) -> None:
        self._last_word = time.monotonic()
        if self.phase is Phase.STALLED:
            self._turn(Phase.SERVING, "serving")
        match frame:
            case Outputs(outputs):
                self._deliver(outputs)
            case Rejected(key, kind, message, field):
                if stream := self._live.pop(key, None):
                    stream.fail(_rejection(kind, message, field))
            case Loads(ranks):
                if self._loads is not None and not self._loads.done():
                    self._loads.set_result(ranks)
                self._loads = None
            case Progress(text):
                self._turn(self.phase, f"starting: {text}")
            case Ready(info):
                self._loading = asyncio.get_running_loop().create_task(self._begin(info))
            case Fatal(message):
                self._turn(Phase.ENDED, message)
                self._fail_all(EngineFailedError(message))

    def _deliver(self, outputs: Iterable[Output]) -> None:
        stopped = []
        for output in outputs:
            stream = self._live.get(output.request_id)
            if stream is None:  # withdrawn; the engine did not know yet
                continue
            stopped_early = False
            if output.finish_reason == "error":
                stream.fail(EngineFailedError(output.error))
            else:
                stopped_early = stream.push(output)
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

    async def _begin(self, info: ModelInfo) -> None:
        try:
            self.tokenizer_files = await asyncio.to_thread(read_files, info.model_path)
            self.tokenizer = await asyncio.to_thread(Tokenizer, self.tokenizer_files)
        except (CheckpointError, OSError) as error:
            self.tokenizer_problem = str(error)
            logger.warning("only token ids can be served, no text: %s", error)
        self._info = info
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

    def _turn(self, phase: Phase, reason: str) -> None:
        self.phase, self.reason = phase, reason
        self.phase_changed.set()
        if phase is Phase.ENDED:
            self.ended.set()


def _rejection(kind: str, message: str, field: str) -> Exception:
    match kind:
        case "invalid":
            return InvalidRequestError(message, field)
        case "duplicate":
            return DuplicateRequestError(message)
        case "queue_full":
            return QueueFullError(message)
        case "unavailable":
            return UnavailableError(message)
    return EngineFailedError(message)
