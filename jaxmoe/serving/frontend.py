"""The front end's process: the gRPC server, its health, and its way to an end. Never imports jax.

Started by `server.Frontend` as `python -m jaxmoe.serving.frontend FD CONFIG`, with the link's socket at FD. A byte on
standard input is the number of a signal that reached the parent: the first drains, the second ends at once.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from typing import Any

import grpc
import msgspec
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from jaxmoe.errors import ConfigError, UnavailableError
from jaxmoe.serving import logs
from jaxmoe.serving.admin import ADMIN_SERVICE, Admin
from jaxmoe.serving.garbage import pass_over_what_is_here
from jaxmoe.serving.link import BindFailed, Bound, FrontendConfig
from jaxmoe.serving.metrics import MetricsServer
from jaxmoe.serving.proto.admin_pb2_grpc import add_AdminServicer_to_server
from jaxmoe.serving.remote_engine import Phase, RemoteEngine
from jaxmoe.serving.security import BearerAuth, Decoding, Tokens, server_credentials
from jaxmoe.serving.servicer import SERVICE, Servicer
from jaxmoe.serving.tracing import Tracer

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),  # a second server on this port is an error, not a rival
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients ping every 10 s, and some pings come late
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),  # finds out that a client's machine is gone
    ("grpc.keepalive_timeout_ms", 20_000),
]


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Descriptors:
    """The pool of all messages and services that reflection tells of; it finds methods too."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """Raises KeyError."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            name, _, method = symbol.rpartition(".")
            service = self._pool.FindServiceByName(name)
            if method not in service.methods_by_name:
                raise
            return service.file


class Health(health.aio.HealthServicer):
    """Ends its watches when the engine has ended; grpc would print a traceback for each that it cancels itself."""

    def __init__(self, ended: asyncio.Event) -> None:
        super().__init__()
        self._ended = ended

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        tasks = [asyncio.create_task(super().Watch(request, context)), asyncio.create_task(self._ended.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the server has shut down")


async def main(sock: socket.socket, config: FrontendConfig) -> int:
    """Serves until the parent asks for the end, or is gone. The exit code: 0 if it was asked and has drained."""
    engine = RemoteEngine(
        step_timeout=config.step_timeout,
        max_backlog=config.max_backlog,
        max_client_requests=config.max_client_requests,
        read_timeout=config.read_timeout,
    )
    await engine.link.connect(sock)
    drain, cut = asyncio.Event(), asyncio.Event()
    async with contextlib.AsyncExitStack() as ending:
        ending.callback(engine.link.close)
        health_servicer = Health(engine.ended)
        await _tell_health(engine, health_servicer)
        try:
            server, bound = await _start(engine, health_servicer, config, drain, ending)
        except ConfigError as error:
            engine.link.send(BindFailed(str(error)))
            return 1
        engine.link.send(bound)

        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _read_signals, drain, cut)
        ways_to_end = [
            asyncio.create_task(way)
            for way in (_drained(engine, drain, config.drain_timeout), cut.wait(), engine.ended.wait())
        ]
        attendants = [
            asyncio.create_task(attendant) for attendant in (engine.watch(), _follow_health(engine, health_servicer))
        ]
        await asyncio.wait(ways_to_end, return_when=asyncio.FIRST_COMPLETED)
        exit_code = 0 if ways_to_end[0].done() else 1
        await engine.end(UnavailableError("the server shut down before this request ended"))
        await server.stop(grace=0.5)
        for task in ways_to_end + attendants:
            task.cancel()
    return exit_code


async def _start(
    engine: RemoteEngine,
    health_servicer: Health,
    config: FrontendConfig,
    drain: asyncio.Event,
    ending: contextlib.AsyncExitStack,
) -> tuple[grpc.aio.Server, Bound]:
    """Opens all ports. Raises ConfigError if one cannot be, or if a file that the config names does not serve."""
    if config.otlp_endpoint is not None:
        engine.tracer = tracer = Tracer(config.otlp_endpoint)
        ending.push_async_callback(asyncio.to_thread, tracer.close)
    bearer = None if config.auth_token_file is None else BearerAuth(Tokens(config.auth_token_file))
    server = grpc.aio.server(options=_OPTIONS, interceptors=[*([bearer] if bearer else []), Decoding()])
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(Servicer(engine, bearer=bearer is not None), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    add_AdminServicer_to_server(Admin(engine, drain.set), server)
    if config.reflection:
        services = (SERVICE, ADMIN_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server, Descriptors())
    host = _bracketed(config.host)
    credentials = None
    if config.tls_cert is not None and config.tls_key is not None:
        credentials = server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)
    try:
        if credentials is None:
            port = server.add_insecure_port(f"{host}:{config.port}")
        else:
            port = server.add_secure_port(f"{host}:{config.port}", credentials)
    except RuntimeError as error:
        also = "" if credentials is None else ", or are the certificate and its key no pair?"
        raise ConfigError(
            f"cannot listen on {host}:{config.port}; is another server running there{also or '?'}"
        ) from error
    metrics = ""
    if config.metrics_port is not None:
        metrics = _serve_metrics(engine, config.metrics_host, config.metrics_port, ending)
    await server.start()
    return server, Bound(f"{host}:{port}", metrics)


def _serve_metrics(engine: RemoteEngine, host: str, port: int, ending: contextlib.AsyncExitStack) -> str:
    """The URL at which they are."""

    def health() -> tuple[bool, str]:
        return engine.phase is Phase.SERVING, engine.reason

    try:
        server = MetricsServer(host, port, engine.metrics, health)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {_bracketed(host)}:{port}: {error.strerror}; use another --metrics-port"
        ) from error
    ending.push_async_callback(asyncio.to_thread, server.close)
    return f"http://{_bracketed(host)}:{server.port}/metrics"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


async def _drained(engine: RemoteEngine, asked: asyncio.Event, timeout: float) -> None:
    await asked.wait()
    await engine.drain(timeout)


def _read_signals(drain: asyncio.Event, cut: asyncio.Event) -> None:
    received = os.read(sys.stdin.fileno(), 16)
    if not received:  # the parent is gone, and the link tells so too
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    for number in received:
        if number in _SIGNALS:
            (cut if drain.is_set() else drain).set()


async def _follow_health(engine: RemoteEngine, servicer: Health) -> None:
    while True:
        engine.phase_changed.clear()
        if engine.phase is Phase.SERVING:
            pass_over_what_is_here()
        await _tell_health(engine, servicer)
        await engine.phase_changed.wait()


async def _tell_health(engine: RemoteEngine, servicer: Health) -> None:
    status = health_pb2.HealthCheckResponse
    for service in ("", SERVICE):
        await servicer.set(service, status.SERVING if engine.phase is Phase.SERVING else status.NOT_SERVING)


if __name__ == "__main__":
    # A Ctrl-C at the terminal, or a service manager's SIGTERM to the whole group, is for the parent to pass on.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    config = msgspec.json.decode(sys.argv[2], type=FrontendConfig)
    logs.configure(config.log_level, config.log_format)
    sys.exit(asyncio.run(main(socket.socket(fileno=int(sys.argv[1])), config)))
