"""The engine's process: starts the front end, builds the engine, runs it, and brings both to an end."""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeAlias

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

logger = logging.getLogger(__name__)

Report: TypeAlias = Callable[[str], None]
BuildEngine: TypeAlias = Callable[[Report], tuple[EngineLike, ModelInfo]]


def run(
    build_engine: BuildEngine,
    *,
    host: str = "127.0.0.1",
    port: int = 50051,
    insecure_bind: bool = False,
    reflection: bool = True,
    drain_timeout: float = 30.0,
    step_timeout: float = 120.0,
    max_backlog: int = 16384,
    on_bound: Report | None = None,
    on_ready: Report | None = None,
) -> int:
    """Serves an engine over gRPC until SIGTERM or SIGINT; returns the exit code. Call it in the main thread.

    The port is open at once: health says NOT_SERVING, and requests are turned away with the progress, until the engine
    is built. The first signal after that drains, a second ends at once; before, the first ends at once.

    build_engine: makes the engine; it is given a function that takes a line on how far it has come.
    port: 0 takes a free one; `on_bound` is told the address in any case.
    insecure_bind: allows a host beyond loopback, although the port is neither encrypted nor authenticated.
    drain_timeout: seconds that running requests have to end.
    step_timeout: seconds a step may take before the engine counts as stalled and its requests fail.
    max_backlog: tokens that may wait for the reader of a stream before it is cut off.
    on_bound, on_ready: called with the address once the port is open, and once requests are served.

    Raises ConfigError if it cannot listen there, and whatever `build_engine` raises.
    """
    _check_host(host, insecure_bind=insecure_bind)
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port} is not in 0..65535 (0 takes a free one)")
    config = FrontendConfig(
        host=host,
        port=port,
        reflection=reflection,
        drain_timeout=drain_timeout,
        step_timeout=step_timeout,
        max_backlog=max_backlog,
        log_level=logging.getLogger().getEffectiveLevel(),
    )
    with _handlers(signal.SIG_DFL), Frontend(config) as frontend:
        if on_bound:
            on_bound(frontend.address)
        with contextlib.suppress(LinkClosed):
            engine, info = build_engine(lambda text: frontend.link.send(Progress(text)))
            with frontend.signals():
                frontend.link.send(Ready(info))
                try:
                    serve_engine(engine, frontend.link, on_serving=lambda: on_ready and on_ready(frontend.address))
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
                case [Bound(address)]:
                    self.address = address
                case [BindFailed(message)]:
                    raise ConfigError(message)
        except LinkClosed:
            self.close()
            raise ConfigError(f"the front end did not start (exit code {self._process.returncode})") from None
        except BaseException:
            self.close()
            raise

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


def _check_host(host: str, *, insecure_bind: bool) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not insecure_bind:
        raise ConfigError(
            f"--host {host} opens a port that is neither encrypted nor authenticated beyond this machine; "
            "use 127.0.0.1, or add --insecure-bind if the network is trusted"
        )
