"""The real front end round a fake engine, and how tests call it."""

import contextlib
import pathlib
import selectors
import signal
import subprocess
import sys
import threading

import grpc
import pytest
from fake_engine import FakeEngine
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from jaxmoe.serving.engine_loop import serve_engine
from jaxmoe.serving.link import FrontendConfig, Ready
from jaxmoe.serving.server import Frontend


class Server:
    """A front end process, with a fake engine in a thread of this one."""

    def __init__(self, frontend, engine, channel):
        self.frontend = frontend
        self.engine = engine
        self.address = frontend.address
        self.channel = channel
        self.stub = VllmEngineStub(channel)

    def generate(self, prompt, *, timeout=30, **fields):
        """A call; `prompt` is text or tokens, `fields` are those of SamplingParams and of GenerateRequest."""
        return self.stub.Generate(generate_request(prompt, **fields), timeout=timeout)

    def refusal(self, prompt, **fields):
        """The error of a call that is refused."""
        with pytest.raises(grpc.RpcError) as error:
            list(self.generate(prompt, **fields))
        return error.value


def generate_request(prompt, **fields):
    own = {name: fields.pop(name) for name in list(fields) if name in pb.GenerateRequest.DESCRIPTOR.fields_by_name}
    request = pb.GenerateRequest(sampling_params=pb.SamplingParams(**fields), **own)
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt is not None:
        request.tokenized.input_ids.extend(prompt)
    return request


def error_detail(error, kind):
    """The google.rpc detail that an error carries."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    detail = getattr(error_details_pb2, kind)()
    assert status.details[0].Unpack(detail)
    return detail


def no_orders(name, content):
    return b""


@contextlib.contextmanager
def serving(info, *, pace=0.0, step_timeout=120.0, max_backlog=16384, tables=None, orders=no_orders, **options):
    """options: further fields of FrontendConfig."""
    config = FrontendConfig(
        host="127.0.0.1",
        port=options.pop("port", 0),
        reflection=options.pop("reflection", True),
        drain_timeout=5,
        step_timeout=step_timeout,
        max_backlog=max_backlog,
        log_level=options.pop("log_level", 30),
        **options,
    )
    engine, ready, failures = FakeEngine(info, pace), threading.Event(), []

    def loop(link):
        try:
            serve_engine(engine, link, on_serving=ready.set, tables=tables, orders=orders)
        except RuntimeError as error:
            failures.append(error)

    with Frontend(config) as frontend:
        thread = threading.Thread(target=loop, args=[frontend.link])
        frontend.link.send(Ready(info))
        thread.start()
        try:
            assert ready.wait(20)
            with grpc.insecure_channel(frontend.address) as channel:
                yield Server(frontend, engine, channel)
        finally:
            engine.gate.set()
            with frontend.signals():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            thread.join(20)
            assert not thread.is_alive()
    assert len(failures) == engine.crash


def tls(pki, **options):
    return {"tls_cert": str(pki / "server.pem"), "tls_key": str(pki / "server.key"), **options}


class Process:
    """A server in a process of its own, as `jaxmoe.serve` runs it."""

    def __init__(self, checkpoint, pace, drain_timeout, port, max_running):
        script = pathlib.Path(__file__).with_name("fake_server.py")
        self.popen = subprocess.Popen(
            [sys.executable, script, checkpoint, *map(str, (pace, drain_timeout, port, max_running))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # or a line could hide from `select` in a buffer
        )
        self.address = self.line()
        assert self.line() == "building"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = VllmEngineStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def line(self):
        with selectors.DefaultSelector() as selector:
            selector.register(self.popen.stdout, selectors.EVENT_READ)
            assert selector.select(timeout=30)
        return self.popen.stdout.readline().decode().strip()

    def build(self, how="go"):
        self.popen.stdin.write(f"{how}\n".encode())

    def ready(self):
        self.build()
        assert self.line() == "ready"

    def signal(self, number=signal.SIGTERM):
        self.popen.send_signal(number)

    def end(self):
        """Exit code and what it wrote to its log, once both processes are gone: they share the pipe."""
        _, log = self.popen.communicate(timeout=30)
        return self.popen.returncode, log.decode()

    def status(self, service=""):
        return self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status

    def watch(self, service=pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name):
        return self.health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)


@contextlib.contextmanager
def process(checkpoint, pace=0.001, drain_timeout=30.0, port=0, max_running=96):
    server = Process(checkpoint, pace, drain_timeout, port, max_running)
    try:
        yield server
    finally:
        server.channel.close()
        if server.popen.poll() is None:
            server.popen.kill()
            server.popen.communicate(timeout=30)
