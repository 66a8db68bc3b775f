"""How RPCs end that cannot do what was asked: which exception is which gRPC status, and its google.rpc detail."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from typing import NoReturn, TypeVar

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxmoe.errors import ConfigError, DuplicateRequestError, InvalidRequestError, QueueFullError, UnavailableError
from jaxmoe.serving.rejections import EngineFailedError
from jaxmoe.serving.streams import SlowReaderError

logger = logging.getLogger(__name__)

_M = TypeVar("_M", bound=Message)

_ABORT_TIMEOUT = 1.0
# What the engine calls otherwise than the protocol.
_ENGINE_FIELDS = {"prompt": "input", "rank": "data_parallel_rank"}
_STATUS: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    DuplicateRequestError: grpc.StatusCode.ALREADY_EXISTS,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SlowReaderError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    EngineFailedError: grpc.StatusCode.INTERNAL,
}


def code_of(error: Exception) -> grpc.StatusCode:
    return _STATUS.get(type(error), grpc.StatusCode.INTERNAL)


async def answer(content: Awaitable[bytes], message: type[_M], context: grpc.aio.ServicerContext) -> _M:
    """The message with this content, once it is there; ends the RPC if it cannot be had."""
    try:
        return message.FromString(await content)
    except Exception as error:
        await abort(context, error)


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
        async with asyncio.timeout(_ABORT_TIMEOUT):
            await context.abort(code, text, details)
    raise grpc.aio.AbortError


def _field_path(field: str) -> str:
    """Where in a GenerateRequest the field is that an error names."""
    if field in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        return f"sampling_params.{field}"
    return _ENGINE_FIELDS.get(field, field)


async def unimplemented(context: grpc.aio.ServicerContext, text: str) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
    raise AssertionError("abort returned")
