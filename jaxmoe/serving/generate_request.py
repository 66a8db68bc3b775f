"""What a GenerateRequest asks for, checked: any field that cannot be honoured is refused by its name."""

import asyncio
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxmoe.engine.request import Constraint, SamplingParams
from jaxmoe.errors import InvalidRequestError
from jaxmoe.serving.link import ModelInfo
from jaxmoe.serving.remote_engine import RemoteEngine
from jaxmoe.serving.tokenization import AnswerText

_MAX_REQUEST_ID = 512
_MAX_STOPS = 32
_MAX_STOP_LENGTH = 512
_MAX_CONSTRAINT = 1 << 18

# Every other field that is set is refused by name, those of later versions of the protocol too.
HONOURED = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "max_tokens",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "n",
        "logprobs",
        "prompt_logprobs",
        "seed",
        "logit_bias",
        "truncate_prompt_tokens",
        "json_schema",
        "regex",
        "grammar",
        "structural_tag",
        "json_object",
        "choice",
        "grammar_from_first_token",  # as all grammars do here
    }
)
# These concern the text the client makes of the tokens; the first also the text in which stop strings are looked for.
LEFT_TO_CLIENT = frozenset(("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"))
_REQUEST_FIELDS = frozenset(("request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"))
# Values beside the default that ask for nothing.
_OFF: dict[str, tuple[Any, ...]] = {"kv_transfer_params_json": ("", "{}")}


def check_fields(request: pb.GenerateRequest, info: ModelInfo) -> None:
    """Raises InvalidRequestError for a field that cannot be honoured, naming it."""
    if len(request.request_id) > _MAX_REQUEST_ID:
        raise InvalidRequestError(
            f"a request id of {len(request.request_id)} characters; send at most {_MAX_REQUEST_ID}", "request_id"
        )
    _refuse_others(request, _REQUEST_FIELDS)
    _refuse_others(request.sampling_params, HONOURED | LEFT_TO_CLIENT)
    if request.WhichOneof("input") is None:
        raise InvalidRequestError("the request has neither `tokenized` nor `text`; send one of them", "input")
    asked = request.sampling_params
    if (
        asked.HasField("truncate_prompt_tokens")
        and asked.truncate_prompt_tokens < 1
        and asked.truncate_prompt_tokens != -1
    ):
        raise InvalidRequestError(
            f"truncate_prompt_tokens={asked.truncate_prompt_tokens} must be >= 1, or -1 for all that fit",
            "truncate_prompt_tokens",
        )
    if request.HasField("data_parallel_rank") and not 0 <= request.data_parallel_rank < info.num_ranks:
        raise InvalidRequestError(
            f"data_parallel_rank={request.data_parallel_rank} is not one of the attention ranks "
            f"0..{info.num_ranks - 1}",
            "data_parallel_rank",
        )


def sampling_params(asked: pb.SamplingParams, info: ModelInfo) -> SamplingParams:
    """Zero means unset, where the protocol cannot tell the two apart."""
    params = SamplingParams(
        temperature=asked.temperature if asked.HasField("temperature") else 1.0,
        top_k=min(asked.top_k, info.vocab_size),
        top_p=asked.top_p or 1.0,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty or 1.0,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias=dict(asked.logit_bias),
        seed=asked.seed if asked.HasField("seed") else None,
        n=asked.n or 1,
        min_tokens=asked.min_tokens,
        max_tokens=asked.max_tokens if asked.HasField("max_tokens") else None,
        stop_token_ids=tuple(asked.stop_token_ids),
        ignore_eos=asked.ignore_eos,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs if asked.HasField("prompt_logprobs") else None,
        constraint=_constraint(asked),
    )
    params.validate(info.vocab_size)
    return params


async def prompt_tokens(request: pb.GenerateRequest, engine: RemoteEngine) -> Sequence[int]:
    """Those that are to be continued: at least one, and fewer than the context holds."""
    info = engine.info
    if request.WhichOneof("input") == "text":
        field = "text"
        prompt: Sequence[int] = await asyncio.to_thread(_encode, request.text, engine)
    else:
        field, prompt = "tokenized.input_ids", request.tokenized.input_ids
    if request.sampling_params.HasField("truncate_prompt_tokens"):
        length = request.sampling_params.truncate_prompt_tokens
        prompt = prompt[-(info.max_context - 1 if length == -1 else length) :]
    if not prompt:
        raise InvalidRequestError("the prompt is empty; send at least one token", field)
    if len(prompt) >= info.max_context:
        raise _too_long(f"{len(prompt)}", info, field)
    if max(prompt) >= info.vocab_size:
        position = next(n for n, token in enumerate(prompt) if token >= info.vocab_size)
        raise InvalidRequestError(
            f"prompt token {prompt[position]} at position {position} is outside the vocabulary of {info.vocab_size}",
            field,
        )
    return prompt


def stop_string_finders(
    asked: pb.SamplingParams, params: SamplingParams, engine: RemoteEngine
) -> list[AnswerText | None]:
    """What looks for stop strings in each sample; None where there are none."""
    if len(asked.stop) > _MAX_STOPS:
        raise InvalidRequestError(f"{len(asked.stop)} stop strings; send at most {_MAX_STOPS}", "stop")
    for stop in asked.stop:
        if not 0 < len(stop) <= _MAX_STOP_LENGTH:
            raise InvalidRequestError(
                f"a stop string of {len(stop)} characters; send 1 to {_MAX_STOP_LENGTH} characters", "stop"
            )
    if not asked.stop:
        return [None] * params.n
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise InvalidRequestError(
            f"stop strings need a tokenizer ({engine.tokenizer_problem}); send stop_token_ids", "stop"
        )
    special = asked.skip_special_tokens
    return [
        AnswerText(tokenizer, asked.stop, min_tokens=params.min_tokens, skip_special_tokens=special)
        for _ in range(params.n)
    ]


def _refuse_others(message: Message, known: frozenset[str]) -> None:
    for field, value in message.ListFields():
        if field.name not in known and value not in _OFF.get(field.name, ()):
            shown = f"{field.name}={value}" if isinstance(value, int | float) else field.name
            raise InvalidRequestError(f"{shown} is not supported by this version; leave it out", field.name)
    for unknown in UnknownFieldSet(message):
        name = f"{message.DESCRIPTOR.name}.{unknown.field_number}"
        raise InvalidRequestError(f"field {name} is of a protocol that this version does not know; leave it out", name)


def _constraint(asked: pb.SamplingParams) -> Constraint | None:
    kind = asked.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not asked.json_object):
        return None
    if kind == "json_object":
        return Constraint(kind)
    choices = tuple(asked.choice.choices) if kind == "choice" else ()
    text = "" if kind == "choice" else getattr(asked, kind)
    length = len(text) + sum(map(len, choices))
    if length > _MAX_CONSTRAINT:
        raise InvalidRequestError(f"{kind} of {length} characters; send at most {_MAX_CONSTRAINT}", kind)
    return Constraint(kind, text, choices)


def _too_long(length: str, info: ModelInfo, field: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"prompt of {length} tokens leaves no room to generate: the context limit is {info.max_context} tokens; "
        f"send at most {info.max_context - 1}",
        field,
    )


def _encode(text: str, engine: RemoteEngine) -> list[int]:
    tokenizer, info = engine.tokenizer, engine.info
    if tokenizer is None:
        raise InvalidRequestError(
            f"this server has no tokenizer ({engine.tokenizer_problem}); send `tokenized`", "text"
        )
    if len(text) > info.max_context * tokenizer.longest_token:  # not worth the time to count
        raise _too_long(f"at least {len(text) // tokenizer.longest_token}", info, "text")
    return tokenizer.encode(text)
