"""Who may call, and over what: TLS, mutual TLS, bearer tokens, and which addresses may be opened without them."""

import hashlib
import hmac
import inspect
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from jaxmoe.errors import ConfigError

logger = logging.getLogger(__name__)

_RELOAD_INTERVAL = 1.0
_OPEN_SERVICES = ("/grpc.health.v1.Health/",)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def server_credentials(cert: str, key: str, client_ca: str | None) -> grpc.ServerCredentials:
    """TLS, with a client's certificate demanded if there is an authority to check it with. Raises ConfigError."""
    pair = (_read("--tls-key", key), _read("--tls-cert", cert))
    authority = None if client_ca is None else _read("--tls-client-ca", client_ca)
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


def _read(option: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}; name a PEM file that can be read") from error


class Tokens:
    """The bearer tokens of a file, one a line; lines that begin with # are comments. Read again when the file changes.

    Raises ConfigError if it cannot be read or has none. Once read, a file that has become unreadable or empty changes
    nothing, and the log says so.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        try:
            self._stamp = self._stat()
            self._digests = self._load()
        except OSError as error:
            raise ConfigError(f"--auth-token-file {path}: {error.strerror}; name a file with a token a line") from error
        if not self._digests:
            raise ConfigError(f"--auth-token-file {path} holds no token; write one a line")
        self._checked = time.monotonic()

    def accept(self, token: str) -> bool:
        """In constant time: all are compared, by digests of one length."""
        self._reload()
        digest, found = _digest(token.encode()), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found

    def _stat(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _load(self) -> list[bytes]:
        lines = (line.strip() for line in self._path.read_bytes().splitlines())
        return [_digest(line) for line in lines if line and not line.startswith(b"#")]

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._checked < _RELOAD_INTERVAL:
            return
        self._checked = now
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            digests = self._load()
        except OSError as error:
            logger.error("the token file cannot be read (%s); the tokens of before stay in force", error.strerror)
            return
        self._stamp = stamp
        if not digests:
            logger.error("the token file holds no token; the tokens of before stay in force")
            return
        self._digests = digests
        logger.warning("the token file has been read again: %d tokens", len(digests))


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


_UNDECODABLE = object()


class BearerAuth(grpc.aio.ServerInterceptor):
    """Lets calls pass whose `authorization: Bearer TOKEN` is known, and those of the health service."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

        async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed: `authorization: Bearer TOKEN` in metadata"
            )

        self._refusal = grpc.unary_stream_rpc_method_handler(refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if handler_call_details.method.startswith(_OPEN_SERVICES):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        scheme, _, token = str(given).partition(" ")
        if scheme.lower() == "bearer" and self._tokens.accept(token.strip()):
            return await continuation(handler_call_details)
        return self._refusal


class Decoding(grpc.aio.ServerInterceptor):
    """Refuses bytes that are no message of their method's type; grpc would write a traceback for each."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        decode, serve = handler.request_deserializer, handler.unary_stream or handler.unary_unary

        def decoded(content: bytes) -> Any:
            try:
                return decode(content)
            except DecodeError:
                return _UNDECODABLE

        async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if request is _UNDECODABLE:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, "the request is no message of the method's type; see reflection"
                )
            return await serve(request, context)

        if inspect.isasyncgenfunction(serve):
            return handler
        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
        return make(checked, decoded, handler.response_serializer)


def caller_key(context: grpc.aio.ServicerContext, *, bearer: bool) -> str:
    """What tells callers apart: the name in a client's certificate, else its token, else its address.

    bearer: tokens are checked; else anybody could pass for many.
    """
    if names := context.peer_identities():
        return f"certificate {names[0]!r}"
    for name, value in context.invocation_metadata() or ():
        if bearer and name == "authorization":
            return f"token {hashlib.sha256(str(value).encode()).hexdigest()[:16]}"
    return context.peer().rpartition(":")[0]
