"""A small client of the server: enough for a terminal or a script. Imports no jax."""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence

import grpc
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from jaxmoe.engine.request import Constraint, SamplingParams
from jaxmoe.errors import DuplicateRequestError, InvalidRequestError, JaxmoeError, QueueFullError, UnavailableError
from jaxmoe.serving.tokenization import AnswerText, Delta, Tokenizer, unpack_files

_INT32 = range(-(2**31), 2**31)


class Client:
    """A server at `host:port`. Needs no disk in common with it: the tokenizer comes over the wire.

        with Client("127.0.0.1:50051") as client:
            for delta in client.generate("Once upon a time", SamplingParams(max_tokens=32)):
                print(delta.text, end="", flush=True)

    Its methods raise a JaxmoeError: UnavailableError if nobody answers there, else what the server says.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", 64 << 20)])
        self._stub = VllmEngineStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    @functools.cached_property
    def model_info(self) -> pb.GetModelInfoResponse:
        with self._errors():
            return self._stub.GetModelInfo(pb.GetModelInfoRequest())

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
        with self._errors():
            chunks = self._stub.GetTokenizer(common_pb2.GetTokenizerRequest())
            return Tokenizer(unpack_files(b"".join(chunk.data for chunk in chunks)))

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
    ) -> Iterator[Delta]:
        """Streams the answer to a text or to tokens; closing the iterator cancels it.

        A stop string is shown only with `include_stop`. It brings one sample and no log-probabilities.
        A server without a tokenizer answers tokens with tokens: the text of each Delta is empty.
        """
        params = params or SamplingParams()
        if params.seed is not None and params.seed not in _INT32:
            raise InvalidRequestError(f"seed={params.seed} does not fit 32 bits, signed", "seed")
        request = pb.GenerateRequest(stream=True, sampling_params=_sampling_params(params, stop))
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokenized.input_ids.extend(prompt)
        text = self._answer_text(prompt, stop, include_stop, params.min_tokens)
        with self._errors():
            call = self._stub.Generate(request)
            try:
                for response in call:
                    if response.HasField("chunk"):
                        tokens = tuple(response.chunk.token_ids)
                        yield Delta(tokens, text.push(tokens) if text else "")
                    else:
                        tokens = tuple(response.complete.output_ids)
                        shown = text.push(tokens, last=True) if text else ""
                        yield Delta(tokens, shown, response.complete.finish_reason)
            finally:
                call.cancel()

    def _answer_text(
        self, prompt: str | Sequence[int], stop: Sequence[str], include_stop: bool, min_tokens: int
    ) -> AnswerText | None:
        try:
            return AnswerText(self.tokenizer, stop, include_stop=include_stop, min_tokens=min_tokens)
        except JaxmoeError:
            if isinstance(prompt, str) or stop:
                raise
            return None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _as_jaxmoe_error(error, self._address) from error


def _sampling_params(params: SamplingParams, stop: Sequence[str]) -> pb.SamplingParams:
    if params.n != 1 or params.logprobs or params.prompt_logprobs is not None:
        raise InvalidRequestError(
            "this client brings one answer without log-probabilities; ask the service for more", "n"
        )
    message = pb.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
        min_tokens=params.min_tokens,
        max_tokens=params.max_tokens,
        stop=stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        skip_special_tokens=True,
    )
    match params.constraint:
        case Constraint("json_object"):
            message.json_object = True
        case Constraint("choice"):
            message.choice.choices.extend(params.constraint.choices)
        case Constraint():
            setattr(message, params.constraint.kind, params.constraint.text)
    return message


def _as_jaxmoe_error(error: grpc.RpcError, address: str) -> JaxmoeError:
    text = error.details() or ""
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError(text)
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
