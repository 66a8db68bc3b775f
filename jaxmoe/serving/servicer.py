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
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineServicer

from jaxmoe.errors import ConfigError, UnavailableError
from jaxmoe.serving.generate_request import check_fields, prompt_tokens, sampling_params, stop_string_finders
from jaxmoe.serving.generate_response import send_stream, send_whole
from jaxmoe.serving.kv_messages import kv_messages
from jaxmoe.serving.link import ModelInfo
from jaxmoe.serving.logs import fields
from jaxmoe.serving.metrics import waiting_by_rank
from jaxmoe.serving.rejections import EngineFailedError
from jaxmoe.serving.remote_engine import Phase, RemoteEngine
from jaxmoe.serving.request_log import Caller
from jaxmoe.serving.routed import ASKS
from jaxmoe.serving.security import caller_key
from jaxmoe.serving.status import abort, answer, code_of, unimplemented
from jaxmoe.serving.tokenization import pack_files

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name

_TOKENIZER_CHUNK = 1 << 20
_LONGEST_WAIT = 3600.0
_TRACE_HEADERS = ("traceparent", "tracestate")
INVALID = "jaxmoe-invalid"  # initial metadata of answers that are no model's


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
            code = code_of(error).name
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
                    token_usage=rank.used_pages / max(1, rank.total_pages),
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
        await unimplemented(context, "this server generates tokens; it makes no embeddings")

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
        return await self._profile(request, context)

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.ProfileResponse:
        return await self._profile(request, context)

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        info = await self._info(context)
        if not info.prefix_cache:
            await unimplemented(context, "this server has no prefix cache to tell of")
        await context.send_initial_metadata(())  # a subscriber waits for it, and events may not come for long
        messages = kv_messages(
            self._engine, request.start_sequence_number, loads_at_once=request.load_records_before_first_batch
        )
        async with contextlib.aclosing(messages):
            async for message in messages:
                await context.write(message)
        await context.abort(grpc.StatusCode.UNAVAILABLE, self._engine.reason)

    async def _profile(self, request: Message, context: grpc.aio.ServicerContext) -> common_pb2.ProfileResponse:
        content = self._engine.order(request.DESCRIPTOR.name, request.SerializeToString())
        return await answer(content, common_pb2.ProfileResponse, context)

    async def _generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        engine, info, asked = self._engine, self._engine.info, request.sampling_params
        check_fields(request, info)
        params = sampling_params(asked, info)
        if _asks_for_routing(context):
            if not info.routed_experts:
                raise ConfigError(
                    f"{ASKS}: this server does not tell which experts tokens go to; start it with --routed-experts"
                )
            params = dataclasses.replace(params, routed_experts=True)
        answers = stop_string_finders(asked, params, engine)
        request_id = request.request_id or str(uuid.uuid4())
        caller = Caller(caller_key(context, bearer=self._bearer), _trace_headers(context))
        with engine.open(request_id, streams=request.stream, answers=answers, caller=caller) as stream:
            prompt = await prompt_tokens(request, engine)
            left = context.time_remaining()
            if left is not None and left <= 0:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request began")
            rank = request.data_parallel_rank if request.HasField("data_parallel_rank") else None
            engine.submit(stream, prompt, params, rank)
            if info.invalid:
                await context.send_initial_metadata(((INVALID, info.invalid),))
            send = send_stream if request.stream else send_whole
            async with stream.reading():
                await send(stream, context, prompt, params, logprobs=asked.HasField("logprobs"))

    async def _info(self, context: grpc.aio.ServicerContext) -> ModelInfo:
        try:
            return self._engine.info
        except UnavailableError as error:
            await abort(context, error)


def _trace_headers(context: grpc.aio.ServicerContext) -> dict[str, str]:
    return {key: str(value) for key, value in context.invocation_metadata() or () if key in _TRACE_HEADERS}


def _asks_for_routing(context: grpc.aio.ServicerContext) -> bool:
    return any(key == ASKS and value not in ("", "0") for key, value in context.invocation_metadata() or ())
