import contextlib
import os
import pathlib
import selectors
import signal
import subprocess
import sys

import grpc
import pytest
from fake_engine import model_info
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import generate_request, serving
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from jaxmoe.errors import ConfigError
from jaxmoe.serving.link import FrontendConfig
from jaxmoe.serving.server import Frontend, run

SERVICE = "vllm.grpc.engine.VllmEngine"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    """A server in a process of its own, as `jaxmoe.serve` runs it."""

    def __init__(self, checkpoint, pace, drain_timeout=30.0):
        script = pathlib.Path(__file__).with_name("fake_server.py")
        self.popen = subprocess.Popen(
            [sys.executable, script, checkpoint, str(pace), str(drain_timeout)],
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

    def watch(self, service=SERVICE):
        return self.health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)


@contextlib.contextmanager
def process(checkpoint, pace=0.001, drain_timeout=30.0):
    server = Process(checkpoint, pace, drain_timeout)
    try:
        yield server
    finally:
        server.channel.close()
        if server.popen.poll() is None:
            server.popen.kill()
            server.popen.communicate(timeout=30)


def test_from_not_serving_to_serving_to_drained(checkpoint):
    with process(checkpoint) as server:
        changes = server.watch()
        assert next(changes).status == NOT_SERVING
        assert server.status() == server.status(SERVICE) == NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            server.status("unknown")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as error:
            list(server.stub.Generate(generate_request([5]), timeout=30))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.value.details() == "starting: compiling 1 of 2"
        assert not server.stub.HealthCheck(pb.HealthCheckRequest(), timeout=30).healthy
        with pytest.raises(grpc.RpcError, match="starting"):
            server.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=30)

        server.ready()
        assert next(changes).status == SERVING
        assert server.status() == server.status(SERVICE) == SERVING
        assert server.stub.HealthCheck(pb.HealthCheckRequest(), timeout=30).healthy

        running = server.stub.Generate(generate_request([5, 6], stream=True, max_tokens=500), timeout=60)
        first = next(running)
        server.signal()
        assert next(changes).status == NOT_SERVING
        assert not server.stub.HealthCheck(pb.HealthCheckRequest(), timeout=30).healthy
        with pytest.raises(grpc.RpcError) as error:
            list(server.stub.Generate(generate_request([5]), timeout=30))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "draining" in error.value.details()
        *rest, last = running
        assert len(first.chunk.token_ids) + sum(len(message.chunk.token_ids) for message in rest) == 500
        assert last.complete.finish_reason == "length"
        assert server.end() == (0, "")


def test_an_idle_server_drains_at_once_on_interrupt(checkpoint):
    with process(checkpoint) as server:
        server.ready()
        server.signal(signal.SIGINT)
        assert server.end() == (0, "")


def test_a_second_signal_ends_running_streams(checkpoint):
    with process(checkpoint) as server:
        server.ready()
        changes = server.watch()
        running = server.stub.Generate(generate_request([5], stream=True), timeout=60)
        next(running)
        assert next(changes).status == SERVING
        server.signal()
        assert next(changes).status == NOT_SERVING
        server.signal()
        with pytest.raises(grpc.RpcError, match="shut down") as error:
            list(running)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.end()[0] == 1


def test_the_drain_timeout_ends_streams_that_outlast_it(checkpoint):
    with process(checkpoint, drain_timeout=0.1) as server:
        server.ready()
        running = server.stub.Generate(generate_request([5], stream=True), timeout=60)
        next(running)
        server.signal()
        with pytest.raises(grpc.RpcError, match="shut down"):
            list(running)
        code, log = server.end()
        assert code == 0
        assert "1 requests had not ended" in log


def test_a_signal_while_the_engine_is_built_ends_both_processes(checkpoint):
    with process(checkpoint) as server:
        server.signal()
        assert server.end()[0] == -signal.SIGTERM


def test_the_error_of_a_build_passes_through(checkpoint):
    with process(checkpoint) as server:
        server.build("fail")
        assert server.end() == (2, "error: the checkpoint is not there\n")


def test_a_crash_of_the_engine_ends_its_streams_cleanly_and_the_server(checkpoint):
    with process(checkpoint) as server:
        server.ready()
        running = server.stub.Generate(generate_request([5], stream=True), timeout=60)
        next(running)
        for call in (server.stub.Generate(generate_request([13]), timeout=60), running):
            with pytest.raises(grpc.RpcError) as error:
                list(call)
            assert error.value.code() is grpc.StatusCode.INTERNAL
            assert error.value.details() == "the engine failed with RuntimeError; the server's log has the details"
        code, log = server.end()
        assert code == 1
        assert "secret detail of the crash" in log


def test_the_front_end_ends_when_the_engine_is_killed(checkpoint):
    with process(checkpoint) as server:
        server.ready()
        running = server.stub.Generate(generate_request([5], stream=True), timeout=60)
        next(running)
        server.popen.kill()
        with pytest.raises(grpc.RpcError) as error:
            list(running)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.value.details() == "the engine's process is gone"
        assert server.end()[0] == -signal.SIGKILL


def test_the_server_ends_when_the_front_end_is_killed(checkpoint):
    with process(checkpoint) as server:
        server.ready()
        children = pathlib.Path(f"/proc/{server.popen.pid}/task/{server.popen.pid}/children")
        os.kill(int(children.read_text()), signal.SIGKILL)
        code, log = server.end()
        assert code == 1
        assert "the front end is gone (exit code -9)" in log


def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(checkpoint):
    with serving(model_info(checkpoint)) as server:
        server.engine.failing = True
        error = server.refusal([5], max_tokens=3)
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "the step failed with SomeError")
        assert [m.complete.output_ids for m in server.generate([5], max_tokens=3)] == [[5, 5, 5]]


def test_a_step_that_hangs_fails_its_requests_until_the_engine_is_back(checkpoint):
    with serving(model_info(checkpoint), step_timeout=0.2) as server:
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == SERVING
        server.engine.gate.clear()
        error = server.refusal([5], max_tokens=3)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "has not finished a step in 0.2 s" in error.details()
        assert next(watch).status == NOT_SERVING
        assert server.refusal([5]).code() is grpc.StatusCode.UNAVAILABLE
        server.engine.gate.set()
        assert next(watch).status == SERVING
        assert [m.complete.output_ids for m in server.generate([5], max_tokens=3)] == [[5, 5, 5]]
        watch.cancel()


def test_a_port_in_use_is_told(server):
    port = int(server.address.rpartition(":")[2])
    config = FrontendConfig(
        host="127.0.0.1",
        port=port,
        reflection=False,
        drain_timeout=1,
        step_timeout=1,
        max_backlog=1,
        log_level=30,
    )
    with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
        Frontend(config)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::", "example.org"])
def test_a_port_beyond_this_machine_must_be_asked_for(host):
    with pytest.raises(ConfigError, match="--insecure-bind"):
        run(lambda report: pytest.fail("built"), host=host)
