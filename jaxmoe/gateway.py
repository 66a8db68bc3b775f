"""`python -m jaxmoe.gateway`: a server and the gateway smg in front of it, which answers OpenAI's clients over HTTP.

Options are those of `python -m jaxmoe.serve`, and what is below; what follows `--` goes to `smg launch`.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxmoe import serve
from jaxmoe.errors import ConfigError, JaxmoeError
from jaxmoe.serving.security import is_loopback

_LOOK_INTERVAL = 0.2
# The gateway is ended when the server has drained: what is left to do is to tell its clients.
_GRACE, _PATIENCE = 2, 5.0
# Ends a process as SIGTERM does when the one that started it is gone, whatever ended that: the wish outlives `exec`.
_TETHERED = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The server's exit code; 1 if the gateway ended first."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--http-host", default="127.0.0.1", help="address of the HTTP port (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=30000, help="(default: %(default)s)")
    options, serve_arguments = parser.parse_known_args(given[:cut])
    served = serve.parse(serve_arguments)
    try:
        gateway = _gateway_command(options, served)
        serve.server_config(served)
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = [sys.executable, "-m", "jaxmoe.serve", *serve_arguments]
    return _supervise(server, [*gateway, *given[cut + 1 :]], _server_address(served))


def _gateway_command(options: argparse.Namespace, served: argparse.Namespace) -> list[str]:
    """Raises ConfigError."""
    if importlib.util.find_spec("smg") is None:
        raise ConfigError("the gateway is not installed; pip install 'jaxmoe[gateway]'")
    secured = [name for name in ("tls_cert", "tls_client_ca", "auth_token_file") if getattr(served, name) is not None]
    if secured:
        raise ConfigError(
            f"--{secured[0].replace('_', '-')}: the gateway speaks to a server in plaintext only, and shows no token; "
            "leave the server's port on loopback, and encrypt in front of the gateway"
        )
    if served.port == 0:
        raise ConfigError("--port 0: the gateway must know the server's port; name one")
    if not is_loopback(options.http_host) and not served.insecure_bind:
        raise ConfigError(
            f"--http-host {options.http_host} opens a port that is neither encrypted nor authenticated beyond this "
            "machine; use 127.0.0.1, or add --insecure-bind if the network is trusted"
        )
    return [
        sys.executable,
        "-m",
        "smg",
        "launch",
        f"--host={options.http_host}",
        f"--port={options.http_port}",
        f"--worker-urls=grpc://{_server_address(served)}",
        "--worker-startup-check-interval=1",
        f"--shutdown-grace-period-secs={_GRACE}",
        f"--block-size={served.page_size}",
        "--prometheus-host=127.0.0.1",
        "--log-level=warn",
    ]


def _server_address(served: argparse.Namespace) -> str:
    """As this machine reaches it."""
    host = served.host if is_loopback(served.host) else "127.0.0.1"
    return f"[{host}]:{served.port}" if ":" in host else f"{host}:{served.port}"


def _supervise(server_command: list[str], gateway_command: list[str], address: str) -> int:
    """Runs both until one ends, then ends the other: the gateway after the server, so that it can drain.

    The gateway is started once the server, at this address, is ready.
    """
    ended = threading.Event()
    # Tokenizers come from the server, not from a hub.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with _child(server_command, ended) as server, _passed_on(server):
        with grpc.insecure_channel(address) as channel:
            while not _serves(channel) and not ended.wait(_LOOK_INTERVAL):
                pass
        if server.poll() is not None:
            return server.returncode
        with _child(gateway_command, ended, environment) as gateway:
            ended.wait()
            if server.poll() is None:
                print(f"error: the gateway has ended with exit code {gateway.wait()}", file=sys.stderr)
                return 1
            return server.returncode


def _serves(channel: grpc.Channel) -> bool:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except grpc.RpcError:
        return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


@contextlib.contextmanager
def _child(
    command: list[str], ended: threading.Event, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that a Ctrl-C at the terminal does not reach; terminated at the end of the block.

    On Linux it does not outlive this one, even if that is killed.
    ended: set when it ends.
    """
    if sys.platform == "linux":
        command = [sys.executable, "-c", _TETHERED, str(os.getpid()), *command]
    process = subprocess.Popen(command, env=environment, process_group=0)

    def watch() -> None:
        process.wait()
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM and Ctrl-C go on to this process: the first drains it, the second ends it."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda number, frame: process.send_signal(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
