"""The engine's process: starts the front end, builds the engine, runs it, and brings both to an end."""

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple, TypeAlias

import msgspec

from jaxmoe.errors import ConfigError
from jaxmoe.serving.engine_loop import EngineLike, serve_engine
from jaxmoe.serving.link import (
    BindFailed,
    Bound,
    EngineLink,
    FrontendConfig,
    LinkClosed,
    ModelInfo,
    Progress,
    Ready,
)
from jaxmoe.serving.logs import LogFormat
from jaxmoe.serving.security import is_loopback

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[[str], None]


class Served(NamedTuple):
    """tables, orders: of `jaxmoe.v1.Admin`; see `jaxmoe.serving.engine_loop.serve_engine`."""

    engine: EngineLike
    info: ModelInfo
    tables: Callable[[str, str], bytes] | None = None
    orders: Callable[[str, bytes], bytes] | None = None


BuildEngine: TypeAlias = Callable[[Report], Served]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where and how a server serves.

    port: 0 takes a free one, as does metrics_port; that is None where metrics are not served.
    insecure_bind: allows hosts beyond loopback on a port that is not encrypted.
    tls_cert, tls_key: PEM files. tls_client_ca: clients must have a certificate of this authority.
    auth_token_file: bearer tokens, one a line, of which clients must send one.
    drain_timeout: seconds that running requests have to end.
    step_timeout: seconds a step may take before the engine counts as stalled and its requests fail.
    max_backlog: tokens that may wait for the reader of a stream before it is cut off.
    read_timeout: seconds that a client has to read the rest of an answer once it has ended.
    max_client_requests: that one client may have open at once; 0 for no limit.
    otlp_endpoint: of an OpenTelemetry collector, over HTTP; None makes no traces.

    Raises ConfigError if these do not go together.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    insecure_bind: bool = False
    reflection: bool = True
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    auth_token_file: str | None = None
    drain_timeout: float = 30.0
    step_timeout: float = 120.0
    max_backlog: int = 16384
    read_timeout: float = 60.0
    max_client_requests: int = 0
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    otlp_endpoint: str | None = None
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together; give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key: clients show theirs over TLS only")
        for option, port in (("--port", self.port), ("--metrics-port", self.metrics_port)):
            if port is not None and not 0 <= port < 1 << 16:
                raise ConfigError(f"{option} {port} is not in 0..65535 (0 takes a free one)")
        if self.max_client_requests < 0:
            raise ConfigError(f"--max-client-requests {self.max_client_requests} must be at least 0 (0: no limit)")
        if self.insecure_bind:
            return
        if self.tls_cert is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} opens a port that is neither encrypted nor authenticated beyond this machine; "
                "use 127.0.0.1, or --tls-cert and --tls-key, or add --insecure-bind if the network is trusted"
            )
        if self.metrics_port is not None and not is_loopback(self.metrics_host):
            raise ConfigError(
                f"--metrics-host {self.metrics_host} shows the metrics, unencrypted, beyond this machine; use "
                "127.0.0.1, or add --insecure-bind if the network is trusted"
            )


def run(
    build_engine: BuildEngine,
    config: ServerConfig = ServerConfig(),
    *,
    on_bound: Callable[[Bound], object] | None = None,
    on_ready: Report | None = None,
) -> int:
    """Serves an engine over gRPC until SIGTERM or SIGINT; returns the exit code. Call it in the main thread.

    The port is open at once: health says NOT_SERVING, and requests are turned away with the progress, until the engine
    is built. The first signal after that drains, a second ends at once; before, the first ends at once.

    build_engine: makes the engine; it is given a function that takes a line on how far it has come.
    on_bound: called with the addresses once the ports are open. on_ready: with the address, once requests are served.

    Raises ConfigError if it cannot listen there, and whatever `build_engine` raises.
    """
    shared = {name: value for name, value in dataclasses.asdict(config).items() if name != "insecure_bind"}
    frontend_config = FrontendConfig(**shared, log_level=logging.getLogger().getEffectiveLevel())
    with _handlers(signal.SIG_DFL), Frontend(frontend_config) as frontend:
        if on_bound:
            on_bound(frontend.bound)
        with contextlib.suppress(LinkClosed):
            engine, info, tables, orders = build_engine(lambda text: frontend.link.send(Progress(text)))
            with frontend.signals():
                frontend.link.send(Ready(info))
                try:
                    serve_engine(
                        engine,
                        frontend.link,
                        on_serving=lambda: on_ready and on_ready(frontend.address),
                        tables=tables,
                        orders=orders,
                    )
                except Exception:
                    logger.exception("the engine failed; the server ends")
                    return 1
        code = frontend.wait()
        if code:
            logger.error("the front end is gone (exit code %d); the server ends", code)
        return 1 if code else 0


class Frontend:
    """The front end's process; ends with the block that it is the context of."""

    def __init__(self, config: FrontendConfig) -> None:
        """Returns once it listens. Raises ConfigError if it cannot."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "jaxmoe.serving.frontend",
                    str(theirs.fileno()),
                    msgspec.json.encode(config).decode(),
                ],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                process_group=0,  # a Ctrl-C at the terminal does not reach it
            )
        self.link = EngineLink(ours)
        try:
            match self.link.receive(block=True):
                case [Bound() as bound]:
                    self.bound = bound
                case [BindFailed(message)]:
                    raise ConfigError(message)
        except LinkClosed:
            self.close()
            raise ConfigError(f"the front end did not start (exit code {self._process.returncode})") from None
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self.bound.address

    def __enter__(self) -> "Frontend":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Passes SIGTERM and SIGINT on to the front end, even while a step keeps this thread from running Python."""
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        with _handlers(lambda number, frame: None):  # only signals with a handler are written to the wakeup fd
            previous = signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(previous)

    def wait(self) -> int:
        """Its exit code, once it has ended; it has ten seconds for that."""
        try:
            return self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def close(self) -> None:
        self.link.close()
        self.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
