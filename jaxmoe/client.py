"""A Python client of the server. Imports no jax.

    with jaxmoe.client.connect("127.0.0.1:50051") as client:
        print(client.generate("Once upon a time", max_tokens=32, temperature=0).text)
        for delta in client.stream("Once upon a time", max_tokens=32):
            print(delta.text, end="", flush=True)
        print(client.chat([{"role": "user", "content": "Who are you?"}]).text)

`connect_async` gives a client whose methods are awaited. Neither needs a disk in common with the server: the tokenizer
comes over the wire. Their methods raise a JaxmoeError: UnavailableError if nobody answers there, else what the server
says.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import random
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple, TypeAlias

import grpc
from google.rpc import error_details_pb2, status_pb2
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from jaxmoe.engine.request import Constraint, SamplingParams
from jaxmoe.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidRequestError,
    JaxmoeError,
    QueueFullError,
    UnavailableError,
)
from jaxmoe.serving.routed import ASKS, read_routed
from jaxmoe.serving.tokenization import AnswerText, Delta, Tokenizer, unpack_files

Prompt: TypeAlias = str | Sequence[int]
Messages: TypeAlias = Sequence[Mapping[str, Any]]
Metadata: TypeAlias = Sequence[tuple[str, str]]

_INT32 = range(-(2**31), 2**31)
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
_SCORING = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.1, 5.0


class Answer(NamedTuple):
    """All of an answer. finish_reason: "stop", "length" or "abort". text: "" from a server without a tokenizer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


class Score(NamedTuple):
    """How likely a text is, token by token, each given those before it; the first has no such number."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        """Log-probability of all that follows the first token."""
        return sum(value for value in self.logprobs if value is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """How to reach a server.

    token: sent with every call. tls: encrypt; tls_ca: and take only a server with a certificate of this authority, else
        of one that the system trusts. tls_cert, tls_key: of the client's own. All three are PEM files.
    retries: how often a call is tried again that the server could not take, or that found nobody, before it fails.
    """

    token: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    retries: int = 4

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.token}")] if self.token else []

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plaintext. Raises ConfigError if a file cannot be read."""
        paths = (self.tls_ca, self.tls_key, self.tls_cert)
        if not self.tls and not any(paths):
            return None
        try:
            return grpc.ssl_channel_credentials(*(Path(path).read_bytes() if path else None for path in paths))
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; name a PEM file that can be read") from error

    def channel(self, address: str) -> grpc.Channel:
        credentials = self.credentials
        if credentials is None:
            return grpc.insecure_channel(address, options=_OPTIONS)
        return grpc.secure_channel(address, credentials, options=_OPTIONS)

    def channel_async(self, address: str) -> grpc.aio.Channel:
        credentials = self.credentials
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        return grpc.aio.secure_channel(address, credentials, options=_OPTIONS)


def connect(address: str, **access: Any) -> "Client":
    """A client of the server at `host:port`. access: fields of `Access`."""
    return Client(address, Access(**access))


def connect_async(address: str, **access: Any) -> "AsyncClient":
    """As `connect`, for use on an event loop."""
    return AsyncClient(address, Access(**access))


class Client:
    """Made by `connect`; see the module. Threads may share it."""

    def __init__(self, address: str, access: Access = Access()) -> None:
        self.address = address
        self.access = access
        self.channel = access.channel(address)
        self._stub = VllmEngineStub(self.channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.channel.close()

    @functools.cached_property
    def model_info(self) -> pb.GetModelInfoResponse:
        (info,) = self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest())
        return info

    @property
    def max_context(self) -> int:
        """Tokens of prompt and generation together."""
        return self.model_info.max_context_length

    @property
    def recommended_sampling(self) -> dict[str, float]:
        """What the checkpoint recommends, by the names of SamplingParams' fields."""
        return json.loads(self.model_info.default_sampling_params_json or "{}")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return _tokenizer(self._call(self._stub.GetTokenizer, common_pb2.GetTokenizerRequest()))

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, stop: Sequence[str] = (), **options: Any
    ) -> Answer:
        """The answer to a text or to tokens, once it is whole.

        params, or in its place fields of it among `options`: how tokens are chosen. stop: strings that end the answer
            and are not shown. options: `request_id`, and `timeout` in seconds, besides.
        """
        return _whole(list(self.stream(prompt, params, stop, **options)))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, stop: Sequence[str] = (), **options: Any
    ) -> Generator[Delta, None, None]:
        """Streams the answer, as for `generate`; closing the iterator cancels it.

        A server without a tokenizer answers tokens with tokens: the text of each Delta is empty.
        """
        request, timeout, asked = _generate_request(prompt, params, stop, options)
        try:
            tokenizer: Tokenizer | JaxmoeError = self.tokenizer
        except JaxmoeError as error:
            tokenizer = error
        text = _answer_text(tokenizer, prompt, stop, asked.min_tokens)
        responses = self._call(self._stub.Generate, request, timeout, _asks(asked))
        with contextlib.closing(responses):
            for response in responses:
                yield _delta(response, text)

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, stop: Sequence[str] = (), **options: Any
    ) -> Answer:
        """The next answer in a conversation of `{"role": ..., "content": ...}`, by the model's template."""
        return self.generate(self.tokenizer.encode_chat(messages), params, stop, **options)

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, stop: Sequence[str] = (), **options: Any
    ) -> Generator[Delta, None, None]:
        """As `chat`, piece by piece."""
        return self.stream(self.tokenizer.encode_chat(messages), params, stop, **options)

    def score(self, prompt: Prompt, timeout: float | None = None) -> Score:
        """Log-probabilities of the tokens of a text, or of these tokens."""
        (answer,) = self._call(self._stub.Generate, _request(prompt, _SCORING), timeout)
        return _score(answer)

    def _call(
        self, method: Any, request: Any, timeout: float | None = None, metadata: Metadata = ()
    ) -> Generator[Any, None, None]:
        """What a method answers, one message or many. Tries again while nothing has come of it."""
        attempts = _Attempts(self.address, self.access.retries, timeout)
        while True:
            call = None
            try:
                call = method(request, metadata=[*self.access.metadata, *metadata], timeout=attempts.time_left)
                if not isinstance(call, grpc.Call):
                    yield call
                    return
                for response in call:
                    attempts.answered = True
                    yield response
                return
            except grpc.RpcError as error:
                sleep(attempts.pause(error))
            finally:
                if isinstance(call, grpc.Call):
                    call.cancel()


class AsyncClient:
    """Made by `connect_async`; for one event loop. Its methods are those of `Client`."""

    def __init__(self, address: str, access: Access = Access()) -> None:
        self.address = address
        self.access = access
        self.channel = access.channel_async(address)
        self._stub = VllmEngineStub(self.channel)
        self._tokenizer: Tokenizer | None = None

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.channel.close()

    async def model_info(self) -> pb.GetModelInfoResponse:
        (info,) = [info async for info in self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest())]
        return info

    async def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            call = self._call(self._stub.GetTokenizer, common_pb2.GetTokenizerRequest())
            chunks = [chunk async for chunk in call]
            self._tokenizer = await asyncio.to_thread(_tokenizer, chunks)
        return self._tokenizer

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, stop: Sequence[str] = (), **options: Any
    ) -> Answer:
        return _whole([delta async for delta in self.stream(prompt, params, stop, **options)])

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, stop: Sequence[str] = (), **options: Any
    ) -> AsyncGenerator[Delta, None]:
        request, timeout, asked = _generate_request(prompt, params, stop, options)
        try:
            tokenizer: Tokenizer | JaxmoeError = await self.tokenizer()
        except JaxmoeError as error:
            tokenizer = error
        text = _answer_text(tokenizer, prompt, stop, asked.min_tokens)
        responses = self._call(self._stub.Generate, request, timeout, _asks(asked))
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield _delta(response, text)

    async def chat(
        self, messages: Messages, params: SamplingParams | None = None, stop: Sequence[str] = (), **options: Any
    ) -> Answer:
        return await self.generate((await self.tokenizer()).encode_chat(messages), params, stop, **options)

    async def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, stop: Sequence[str] = (), **options: Any
    ) -> AsyncGenerator[Delta, None]:
        deltas = self.stream((await self.tokenizer()).encode_chat(messages), params, stop, **options)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def score(self, prompt: Prompt, timeout: float | None = None) -> Score:
        (answer,) = [answer async for answer in self._call(self._stub.Generate, _request(prompt, _SCORING), timeout)]
        return _score(answer)

    async def _call(
        self, method: Any, request: Any, timeout: float | None = None, metadata: Metadata = ()
    ) -> AsyncGenerator[Any, None]:
        attempts = _Attempts(self.address, self.access.retries, timeout)
        while True:
            call = method(request, metadata=[*self.access.metadata, *metadata], timeout=attempts.time_left)
            try:
                if isinstance(call, grpc.aio.UnaryUnaryCall):
                    yield await call
                    return
                async for response in call:
                    attempts.answered = True
                    yield response
                return
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause(error))
            finally:
                call.cancel()


class _Attempts:
    """Whether a call is tried again, and when."""

    def __init__(self, address: str, retries: int, timeout: float | None) -> None:
        self._address = address
        self._retries = retries
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._pause = _FIRST_BACKOFF
        self.answered = False

    @property
    def time_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause(self, error: grpc.RpcError) -> float:
        """Seconds until the next attempt; raises the error, as a JaxmoeError, if there is none."""
        seconds = self._seconds(error)
        left = self.time_left
        if self.answered or seconds is None or self._retries < 1 or (left is not None and left < seconds):
            raise as_jaxmoe_error(error, self._address) from error
        self._retries -= 1
        self._pause = min(2 * self._pause, _LONGEST_BACKOFF)
        return seconds

    def _seconds(self, error: grpc.RpcError) -> float | None:
        """A full queue says when to come back; a server that starts, drains or is gone does not."""
        backoff = self._pause * random.uniform(0.5, 1.0)
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return backoff
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and (told := _retry_delay(error)) is not None:
            return told + backoff
        return None


def _retry_delay(error: grpc.RpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    return info.retry_delay.seconds + info.retry_delay.nanos / 1e9
    return None


def _generate_request(
    prompt: Prompt, params: SamplingParams | None, stop: Sequence[str], options: dict[str, Any]
) -> tuple[pb.GenerateRequest, float | None, SamplingParams]:
    timeout, request_id = options.pop("timeout", None), options.pop("request_id", "")
    if params is not None and options:
        raise TypeError(f"give params, or fields of it ({', '.join(options)}), not both")
    params = params or SamplingParams(**options)
    if params.seed is not None and params.seed not in _INT32:
        raise InvalidRequestError(f"seed={params.seed} does not fit 32 bits, signed", "seed")
    if params.n != 1 or params.logprobs or params.prompt_logprobs is not None:
        raise InvalidRequestError("an answer here is one sample; `score` tells log-probabilities", "n")
    request = _request(prompt, params, stop, request_id)
    request.stream = True
    return request, timeout, params


def _request(
    prompt: Prompt, params: SamplingParams, stop: Sequence[str] = (), request_id: str = ""
) -> pb.GenerateRequest:
    """Fields of SamplingParams have the names of the message's, but for the constraint."""
    asked = pb.SamplingParams(stop=stop, skip_special_tokens=True)
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value is not None and field.name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
            asked.MergeFrom(pb.SamplingParams(**{field.name: value}))
    match params.constraint:
        case Constraint("json_object"):
            asked.json_object = True
        case Constraint("choice"):
            asked.choice.choices.extend(params.constraint.choices)
        case Constraint():
            setattr(asked, params.constraint.kind, params.constraint.text)
    request = pb.GenerateRequest(request_id=request_id, sampling_params=asked)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokenized.input_ids.extend(prompt)
    return request


def _answer_text(
    tokenizer: Tokenizer | JaxmoeError, prompt: Prompt, stop: Sequence[str], min_tokens: int
) -> AnswerText | None:
    """tokenizer: or why there is none; that matters only to who sends text, or wants to have some."""
    if not isinstance(tokenizer, JaxmoeError):
        return AnswerText(tokenizer, stop, min_tokens=min_tokens)
    if isinstance(prompt, str) or stop or isinstance(tokenizer, UnavailableError):
        raise tokenizer
    return None


def _delta(response: pb.GenerateResponse, text: AnswerText | None) -> Delta:
    if response.HasField("chunk"):
        tokens = tuple(response.chunk.token_ids)
        return Delta(tokens, text.push(tokens) if text else "", routed_experts=read_routed(response.chunk))
    tokens = tuple(response.complete.output_ids)
    return Delta(tokens, text.push(tokens, last=True) if text else "", response.complete.finish_reason)


def _asks(params: SamplingParams) -> Metadata:
    return [(ASKS, "1")] if params.routed_experts else []


def _whole(deltas: Sequence[Delta]) -> Answer:
    return Answer(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        deltas[-1].finish_reason or "",
    )


def _score(answer: pb.GenerateResponse) -> Score:
    told = answer.complete.input_logprobs
    values = (each.value if each.HasField("value") else None for each in told.token_logprobs)
    return Score(tuple(told.token_ids), tuple(values))


def _tokenizer(chunks: Any) -> Tokenizer:
    return Tokenizer(unpack_files(b"".join(chunk.data for chunk in chunks)))


def as_jaxmoe_error(error: grpc.RpcError, address: str) -> JaxmoeError:
    text = error.details() or ""
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError(text)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return ConfigError(text)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return QueueFullError(text)
        case grpc.StatusCode.ALREADY_EXISTS:
            return DuplicateRequestError(text)
        case grpc.StatusCode.UNAVAILABLE if "failed to connect" in text:
            return UnavailableError(f"no server answers at {address}; start one with `python -m jaxmoe.serve`")
        case grpc.StatusCode.UNAVAILABLE:
            return UnavailableError(f"the server at {address} is not available: {text}")
        case code:
            return JaxmoeError(f"the server at {address} answered {code.name}: {text}")
