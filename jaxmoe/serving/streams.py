"""The tokens of one request on their way from the engine to its reader. Imports neither jax nor grpc."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from jaxmoe.engine.request import Output, PromptLogprobs, RoutedExperts, TopLogprobs
from jaxmoe.serving.metrics import Timeline
from jaxmoe.serving.tokenization import AnswerText


class SlowReaderError(Exception):
    """A client reads its stream more slowly than tokens come, and too many wait for it."""


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
        """Whether this ends the sample although the engine would go on with it. Its reader is to be woken."""
        sample = self._samples[output.index]
        if self._error is not None or sample.finish is not None:
            return False
        sample.push(output)
        self._unread[output.index] = None
        waiting = sum(len(each.tokens) for each in self._samples)
        if self._max_backlog is not None and waiting > self._max_backlog:
            self._cut(f"{waiting} tokens of this stream wait to be read; read faster, or do not stream")
        return sample.finish is not None and output.finish_reason is None

    def wake(self) -> None:
        self._news.set()

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
        if self._scope is not None and self._patience is None:
            text = f"this answer has not been read within {seconds:g} s of its end; read faster"
            self._patience = asyncio.get_running_loop().call_later(seconds, self._cut, text)

    def _cut(self, text: str) -> None:
        self._error = self._error or SlowReaderError(text)
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
