"""`vllm.grpc.engine.VllmEngine`: the gRPC service that gateways speak, in front of the engine."""

import asyncio
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import error_details_pb2, status_pb2
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineServicer

from jaxmoe.engine.request import Constraint, RoutedExperts, SamplingParams, TopLogprobs
from jaxmoe.errors import ConfigError, DuplicateRequestError, InvalidRequestError, QueueFullError, UnavailableError
from jaxmoe.serving.kv_log import Told
from jaxmoe.serving.link import ModelInfo, RankLoad
from jaxmoe.serving.logs import fields
from jaxmoe.serving.metrics import waiting_by_rank
from jaxmoe.serving.remote_engine import (
    Caller,
    EngineFailedError,
    Finish,
    Phase,
    Piece,
    RemoteEngine,
    SlowReaderError,
    Stream,
)
from jaxmoe.serving.routed import ASKS, add_routed
from jaxmoe.serving.security import caller_key
from jaxmoe.serving.tokenization import AnswerText, pack_files

logger = logging.getLogger(__name__)

_M = TypeVar("_M", bound=Message)

SERVICE = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name

_MAX_REQUEST_ID = 512
_MAX_STOPS = 32
_MAX_STOP_LENGTH = 512
_MAX_CONSTRAINT = 1 << 18
_TOKENIZER_CHUNK = 1 << 20
_STATUS_TIMEOUT = 1.0
_LONGEST_WAIT = 3600.0

_STATUS: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SlowReaderError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    EngineFailedError: grpc.StatusCode.INTERNAL,
}

# Every other field that is set is refused by name, those of later versions of the protocol too.
_HONOURED = frozenset(
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
_LEFT_TO_CLIENT = frozenset(("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"))
_REQUEST_FIELDS = frozenset(("request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"))
# Values beside the default that ask for nothing.
_OFF: dict[str, tuple[Any, ...]] = {"kv_transfer_params_json": ("", "{}")}
_TRACE_HEADERS = ("traceparent", "tracestate")
_ENGINE_FIELDS = {"prompt": "input", "rank": "data_parallel_rank"}
INVALID = "jaxmoe-invalid"  # initial metadata of answers that are no model's
# Load records: how long after an event, and how often all of them though nothing has changed.
_HEARTBEAT, _BEATS = 1.0, 5


class Servicer(VllmEngineServicer):
    """All handlers run on one event loop, which never waits for the engine."""

    def __init__(self, engine: RemoteEngine, *, bearer: bool = False) -> None:
        """bearer: callers have shown a token that is known."""
        self._engine = engine
        self._bearer = bearer
        self._start = time.monotonic()
        self._last_receive = 0.0
        self._archive: bytes | None = None

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        self._last_receive = time.time()
        try:
            await self._generate(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            code = _STATUS.get(type(error), grpc.StatusCode.INTERNAL).name
            self._engine.metrics.refused(code)
            logger.info("request refused", extra=fields(request_id=request.request_id, code=code))
            await abort(context, error)

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        self._engine.abort(request.request_ids)
        return pb.AbortResponse()

    async def HealthCheck(self, request: Any, context: grpc.aio.ServicerContext) -> pb.HealthCheckResponse:
        # A gateway takes who answers at all for a worker, and asks once what it serves: too early while it starts.
        await self._info(context)
        return pb.HealthCheckResponse(healthy=self._engine.phase is Phase.SERVING, message=self._engine.reason)

    async def GetModelInfo(self, request: Any, context: grpc.aio.ServicerContext) -> pb.GetModelInfoResponse:
        info = await self._info(context)
        return pb.GetModelInfoResponse(
            model_path=info.model_path,
            is_generation=True,
            max_context_length=info.max_context,
            vocab_size=info.vocab_size,
            served_model_name=info.served_model_name,
            tokenizer_path="",  # so that gateways, which may not see our disk, ask GetTokenizer
            model_type=info.model_type,
            architectures=info.architectures,
            eos_token_ids=info.eos_token_ids,
            pad_token_id=info.pad_token_id,
            bos_token_id=info.bos_token_id,
            max_req_input_len=info.max_context - 1,
            default_sampling_params_json=json.dumps(info.default_sampling_params)
            if info.default_sampling_params
            else "",
        )

    async def GetServerInfo(self, request: Any, context: grpc.aio.ServicerContext) -> pb.GetServerInfoResponse:
        info = await self._info(context)
        return pb.GetServerInfoResponse(
            active_requests=self._engine.num_open,
            last_receive_timestamp=self._last_receive,
            uptime_seconds=time.monotonic() - self._start,
            server_type="jaxmoe-grpc",
            data_parallel_size=info.num_ranks,
            block_size=info.page_size,
            model_dtype=info.dtype,
            max_num_seqs=info.max_running,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadsResponse:
        try:
            loads = await self._engine.loads()
        except (UnavailableError, EngineFailedError) as error:
            await abort(context, error)
        info = self._engine.info
        in_queue = waiting_by_rank(loads, self._engine.unplaced(loads))
        uncached = self._engine.waiting_tokens(len(loads))
        report = []
        for n, (rank, waiting) in enumerate(zip(loads, in_queue, strict=True)):
            report.append(
                pb.SchedulerLoad(
                    dp_rank=n,
                    num_running_reqs=rank.running,
                    num_waiting_reqs=waiting,
                    num_total_reqs=rank.running + waiting,
                    num_used_tokens=rank.used_pages * info.page_size,
                    max_total_num_tokens=rank.total_pages * info.page_size,
                    token_usage=_usage(rank),
                    gen_throughput=rank.throughput,
                    cache_hit_rate=rank.hit_rate,
                    utilization=rank.running / max(1, info.max_running // len(loads)),
                    max_running_requests=info.max_running // len(loads),
                    num_waiting_uncached_tokens=uncached[n],
                )
            )
        if request.HasField("dp_rank"):
            report = [rank for rank in report if rank.dp_rank == request.dp_rank]
        return pb.GetLoadsResponse(
            timestamp=datetime.datetime.now(datetime.UTC).isoformat(),
            version=importlib.metadata.version("jaxmoe"),
            dp_rank_count=len(report),
            loads=report,
        )

    async def GetTokenizer(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await self._info(context)
        if self._engine.tokenizer is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no tokenizer: {self._engine.tokenizer_problem}")
        if self._archive is None:
            self._archive = await asyncio.to_thread(pack_files, self._engine.tokenizer_files)
        archive = self._archive
        for start in range(0, len(archive), _TOKENIZER_CHUNK):
            end = start + _TOKENIZER_CHUNK
            checksum = hashlib.sha256(archive).hexdigest() if end >= len(archive) else ""
            await context.write(common_pb2.GetTokenizerChunk(data=archive[start:end], sha256=checksum))

    async def Embed(self, request: Any, context: grpc.aio.ServicerContext) -> NoReturn:
        await _unimplemented(context, "this server generates tokens; it makes no embeddings")

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.FlushCacheResponse:
        try:
            done = await self._engine.clear_prefix_cache(min(max(0.0, request.timeout_s), _LONGEST_WAIT))
        except (UnavailableError, EngineFailedError) as error:
            await abort(context, error)
        if done:
            return common_pb2.FlushCacheResponse(success=True, message="the prefix cache is empty")
        text = f"{self._engine.num_open} requests are open; flush when they have ended, or give it more seconds to wait"
        return common_pb2.FlushCacheResponse(success=False, message=text)

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        return await ordered(self._engine, request, common_pb2.ProfileResponse, context)

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        return await ordered(self._engine, request, common_pb2.ProfileResponse, context)

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        info = await self._info(context)
        if not info.prefix_cache:
            await _unimplemented(context, "this server has no prefix cache to tell of")
        await context.send_initial_metadata(())  # a subscriber waits for it, and events may not come for long
        # A record alone has the number of its rank's last batch.
        last = dict.fromkeys(range(info.num_ranks), 0) if request.load_records_before_first_batch else {}
        records = _LoadRecords(self._engine)
        async with contextlib.aclosing(self._engine.kv_events(request.start_sequence_number, _HEARTBEAT)) as events:
            async for told in events:
                if told is not None:
                    batch = _kv_batch(told, info.page_size)
                    if (record := records.of_rank(told.batch.rank)) is not None:
                        batch.load.CopyFrom(record)
                    last[told.batch.rank] = batch.sequence_number
                    await context.write(batch)
                    continue
                for rank, record in records.beat():
                    if rank in last:
                        message = common_pb2.KvEventBatch(sequence_number=last[rank], dp_rank=rank, load=record)
                        message.timestamp = time.time()
                        await context.write(message)
        await context.abort(grpc.StatusCode.UNAVAILABLE, self._engine.reason)

    async def _generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        engine, info, asked = self._engine, self._engine.info, request.sampling_params
        _check_fields(request, info)
        params = _sampling_params(asked, info)
        if _asks_for_routing(context):
            if not info.routed_experts:
                raise ConfigError(
                    f"{ASKS}: this server does not tell which experts tokens go to; start it with --routed-experts"
                )
            params = dataclasses.replace(params, routed_experts=True)
        answers = self._answers(asked, params)
        request_id = request.request_id or str(uuid.uuid4())
        caller = Caller(caller_key(context, bearer=self._bearer), _trace_headers(context))
        with engine.open(request_id, streams=request.stream, answers=answers, caller=caller) as stream:
            prompt = await self._prompt(request, info)
            left = context.time_remaining()
            if left is not None and left <= 0:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request began")
            rank = request.data_parallel_rank if request.HasField("data_parallel_rank") else None
            engine.submit(stream, prompt, params, rank)
            if info.invalid:
                await context.send_initial_metadata(((INVALID, info.invalid),))
            send = _send_stream if request.stream else _send_whole
            async with stream.reading():
                await send(stream, context, prompt, params, logprobs=asked.HasField("logprobs"))

    async def _prompt(self, request: pb.GenerateRequest, info: ModelInfo) -> Sequence[int]:
        if request.WhichOneof("input") == "text":
            field = "text"
            prompt: Sequence[int] = await asyncio.to_thread(self._encode, request.text, info)
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
                f"prompt token {prompt[position]} at position {position} is outside the vocabulary of "
                f"{info.vocab_size}",
                field,
            )
        return prompt

    def _encode(self, text: str, info: ModelInfo) -> list[int]:
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                f"this server has no tokenizer ({self._engine.tokenizer_problem}); send `tokenized`", "text"
            )
        if len(text) > info.max_context * tokenizer.longest_token:  # not worth the time to count
            raise _too_long(f"at least {len(text) // tokenizer.longest_token}", info, "text")
        return tokenizer.encode(text)

    def _answers(self, asked: pb.SamplingParams, params: SamplingParams) -> list[AnswerText | None]:
        """What looks for stop strings, if there are any, in each sample."""
        field, tokenizer = "stop", self._engine.tokenizer
        if len(asked.stop) > _MAX_STOPS:
            raise InvalidRequestError(f"{len(asked.stop)} stop strings; send at most {_MAX_STOPS}", field)
        for stop in asked.stop:
            if not 0 < len(stop) <= _MAX_STOP_LENGTH:
                raise InvalidRequestError(
                    f"a stop string of {len(stop)} characters; send 1 to {_MAX_STOP_LENGTH} characters", field
                )
        if not asked.stop:
            return [None] * params.n
        if tokenizer is None:
            raise InvalidRequestError(
                f"stop strings need a tokenizer ({self._engine.tokenizer_problem}); send stop_token_ids", field
            )
        special = asked.skip_special_tokens
        return [
            AnswerText(tokenizer, asked.stop, min_tokens=params.min_tokens, skip_special_tokens=special)
            for _ in range(params.n)
        ]

    async def _info(self, context: grpc.aio.ServicerContext) -> ModelInfo:
        try:
            return self._engine.info
        except UnavailableError as error:
            await abort(context, error)


def _trace_headers(context: grpc.aio.ServicerContext) -> dict[str, str]:
    return {key: str(value) for key, value in context.invocation_metadata() or () if key in _TRACE_HEADERS}


async def _send_stream(
    stream: Stream,
    context: grpc.aio.ServicerContext,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    logprobs: bool,
) -> None:
    """What has come since the last write goes out together: one chunk a step, more tokens a chunk for a slow reader."""
    totals, left = [0] * params.n, params.n
    while left:
        piece = await stream.read()
        if piece.token_ids:
            totals[piece.sample] += len(piece.token_ids)
            chunk = pb.GenerateStreamChunk(
                token_ids=piece.token_ids,
                prompt_tokens=len(prompt),
                cached_tokens=stream.timeline.cached_tokens,
                completion_tokens=len(piece.token_ids),
                index=piece.sample,
            )
            _add_logprobs(chunk, piece, prompt, params, logprobs=logprobs)
            add_routed(chunk, piece.routed)
            await context.write(pb.GenerateResponse(chunk=chunk))
        if piece.finish is not None:
            left -= 1
            complete = _complete(piece.finish, piece.sample, stream, totals[piece.sample])
            await context.write(pb.GenerateResponse(complete=complete))


async def _send_whole(
    stream: Stream,
    context: grpc.aio.ServicerContext,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    logprobs: bool,
) -> None:
    wholes: dict[int, pb.GenerateComplete] = {}
    routed: dict[int, RoutedExperts] = {}
    left = params.n
    while left:
        piece = await stream.read()
        whole = wholes.setdefault(piece.sample, pb.GenerateComplete())
        whole.output_ids.extend(piece.token_ids)
        _add_logprobs(whole, piece, prompt, params, logprobs=logprobs)
        if piece.routed is not None:
            before = routed.setdefault(piece.sample, piece.routed._replace(experts=b""))
            routed[piece.sample] = before._replace(experts=before.experts + piece.routed.experts)
        if piece.finish is not None:
            left -= 1
            add_routed(whole, routed.get(piece.sample))
            whole.MergeFrom(_complete(piece.finish, piece.sample, stream, len(whole.output_ids)))
            await context.write(pb.GenerateResponse(complete=whole))


def _add_logprobs(
    message: pb.GenerateStreamChunk | pb.GenerateComplete,
    piece: Piece,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    logprobs: bool,
) -> None:
    """Appends the piece's log-probabilities, and with the first token those of the prompt, as far as asked for."""
    if logprobs and piece.token_ids:
        told = message.output_logprobs
        told.token_ids.extend(piece.token_ids)
        told.token_logprobs.extend(piece.logprobs)
        told.top_logprobs.extend(map(_top, piece.top_logprobs))
    if piece.prompt_logprobs is not None:
        of_prompt = message.input_logprobs
        of_prompt.token_ids.extend(prompt)
        of_prompt.token_logprobs.add()  # nothing is before the first token
        of_prompt.token_logprobs.extend(pb.InputTokenLogProb(value=value) for value, _ in piece.prompt_logprobs)
        if params.prompt_logprobs:
            of_prompt.top_logprobs.add()
            of_prompt.top_logprobs.extend(_top(top) for _, top in piece.prompt_logprobs)


def _top(top: TopLogprobs) -> pb.TopLogProbs:
    return pb.TopLogProbs(values=[value for _, value in top], token_ids=[token for token, _ in top])


def _complete(finish: Finish, index: int, stream: Stream, completion_tokens: int) -> pb.GenerateComplete:
    return pb.GenerateComplete(
        index=index,
        finish_reason=finish.reason,
        prompt_tokens=stream.timeline.prompt_tokens,
        cached_tokens=stream.timeline.cached_tokens,
        completion_tokens=completion_tokens,
        matched_token_id=finish.stop_token,
        matched_stop_str=finish.stop_string,
    )


def _kv_batch(told: Told, page_size: int) -> common_pb2.KvEventBatch:
    number, rank, events = told.batch
    message = common_pb2.KvEventBatch(sequence_number=number, timestamp=time.time(), dp_rank=rank)
    if told.blocks is not None:
        message.snapshot.count, message.snapshot.blocks = 1, told.blocks
    for index, event in enumerate(events):
        one = message.events.add(event_id=index if told.blocks is None else 0)
        match event.kind:
            case "cleared":
                one.cleared.SetInParent()
            case "removed":
                one.removed.block_hashes.extend(event.hashes)
            case "stored":
                if event.parent is not None:
                    one.stored.parent_block_hash = event.parent
                for n, page in enumerate(event.hashes):
                    tokens = event.token_ids[n * page_size : (n + 1) * page_size]
                    one.stored.blocks.add(block_hash=page, token_ids=tokens, block_size=page_size)
    return message


def _usage(rank: RankLoad) -> float:
    return rank.used_pages / max(1, rank.total_pages)


class _LoadRecords:
    """What each rank carries, as one subscriber is told it."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
        self._sample = self._beats = 0
        self._told: dict[int, common_pb2.EngineLoad] = {}
        self._heard: float | None = None
        self._waiting: list[int] = []
        self._uncached: list[int] = []

    def of_rank(self, rank: int) -> common_pb2.EngineLoad | None:
        """Beside an event; None before the engine has told anything."""
        ranks, age = self._engine.reported
        return self._record(ranks, rank, age) if ranks else None

    def beat(self) -> Iterator[tuple[int, common_pb2.EngineLoad]]:
        """Of ranks where something has changed, and now and then of all."""
        ranks, age = self._engine.reported
        self._beats += 1
        self._heard = None  # requests come though the engine is silent
        for number, rank in enumerate(ranks):
            record = self._record(ranks, number, age)
            silence = self._engine.silence
            core = common_pb2.EngineLoad()
            core.CopyFrom(record)
            core.ClearField("sample")
            core.ClearField("age_ms")
            if core == self._told.get(number) and silence is None and self._beats % _BEATS:
                continue
            self._told[number] = core
            record.load_only = record.engine_reports_steps = True
            record.cache_hit_rate = rank.hit_rate
            record.num_used_tokens = rank.used_pages * self._engine.info.page_size
            record.max_total_num_tokens = rank.total_pages * self._engine.info.page_size
            record.prefill_pending_tokens = self._engine.prefilling_tokens
            if silence is not None:
                record.engine_silence_ms = int(1000 * silence)
            yield number, record

    def _record(self, ranks: Sequence[RankLoad], number: int, age: float) -> common_pb2.EngineLoad:
        engine, rank = self._engine, ranks[number]
        self._sample += 1
        if self._heard != engine.last_word:  # once for all that a step brings
            self._heard = engine.last_word
            self._waiting = waiting_by_rank(ranks, engine.unplaced(ranks))
            self._uncached = engine.waiting_tokens(len(ranks))
        return common_pb2.EngineLoad(
            running_requests=rank.running,
            waiting_requests=self._waiting[number],
            waiting_uncached_tokens=self._uncached[number],
            token_usage=_usage(rank),
            active_token_usage=_usage(rank),
            gen_throughput=rank.throughput if engine.num_live else 0.0,
            max_running_requests=engine.info.max_running // len(ranks),
            age_ms=int(1000 * age),
            sample=self._sample,
        )


def _asks_for_routing(context: grpc.aio.ServicerContext) -> bool:
    return any(key == ASKS and value not in ("", "0") for key, value in context.invocation_metadata() or ())


def _check_fields(request: pb.GenerateRequest, info: ModelInfo) -> None:
    """Raises InvalidRequestError for a field that cannot be honoured, naming it."""
    if len(request.request_id) > _MAX_REQUEST_ID:
        raise InvalidRequestError(
            f"a request id of {len(request.request_id)} characters; send at most {_MAX_REQUEST_ID}", "request_id"
        )
    _refuse_others(request, _REQUEST_FIELDS)
    _refuse_others(request.sampling_params, _HONOURED | _LEFT_TO_CLIENT)
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


def _refuse_others(message: Message, known: frozenset[str]) -> None:
    for field, value in message.ListFields():
        if field.name not in known and value not in _OFF.get(field.name, ()):
            shown = f"{field.name}={value}" if isinstance(value, int | float) else field.name
            raise InvalidRequestError(f"{shown} is not supported by this version; leave it out", field.name)
    for unknown in UnknownFieldSet(message):
        name = f"{message.DESCRIPTOR.name}.{unknown.field_number}"
        raise InvalidRequestError(f"field {name} is of a protocol that this version does not know; leave it out", name)


def _sampling_params(asked: pb.SamplingParams, info: ModelInfo) -> SamplingParams:
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


async def ordered(engine: RemoteEngine, request: Message, response: type[_M], context: Any) -> _M:
    """What the engine answers to a request between two steps; ends the RPC if it cannot."""
    try:
        content = await engine.order(request.DESCRIPTOR.name, request.SerializeToString())
    except Exception as error:
        await abort(context, error)
    return response.FromString(content)


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """Ends an RPC with the error's status and, where there is one, its google.rpc detail."""
    code, text = _STATUS.get(type(error)), str(error)
    if code is None:
        logger.error("a handler failed", exc_info=error)
        code, text = grpc.StatusCode.INTERNAL, "the server failed; its log has the details"
    status = status_pb2.Status(code=code.value[0], message=text)
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=_field_path(error.field), description=text)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(error, QueueFullError):
        delay = duration_pb2.Duration(seconds=1)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    details = (("grpc-status-details-bin", status.SerializeToString()),) if status.details else ()
    # To a client that does not read, the status is on its way but not sent: there is no use in waiting for it.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(context.abort(code, text, details), _STATUS_TIMEOUT)
    raise grpc.aio.AbortError


def _field_path(field: str) -> str:
    """Where in a GenerateRequest the field is that an error names."""
    if field in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        return f"sampling_params.{field}"
    return _ENGINE_FIELDS.get(field, field)


async def _unimplemented(context: grpc.aio.ServicerContext, text: str) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
    raise AssertionError("abort returned")
