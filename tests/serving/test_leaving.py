"""However a request is left: its pages are free before another step begins."""

import contextlib
import socket
import struct
import threading

import grpc
import pytest
from harness import generate_request
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what closes says so by a reset


class Wire:
    """A way to a server that counts what comes over it, and can be torn."""

    def __init__(self, address):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = 0
        host, port = address.split(":")
        self._ends = [socket.create_connection((host, int(port)))]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        with contextlib.suppress(OSError):  # torn before anybody came
            self._ends.append(self._listener.accept()[0])
            pairs = (self._ends, self._ends[::-1])
            self._threads += [threading.Thread(target=self._pass_on, args=pair) for pair in pairs]
            for thread in self._threads[1:]:
                thread.start()

    def _pass_on(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.received += len(data) if source is self._ends[0] else 0
                sink.sendall(data)

    def tear(self):
        for end in (*self._ends, self._listener):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.shutdown(socket.SHUT_RD)  # a thread that waits in it holds it open
            end.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def wire(server):
    wire = Wire(server.address)
    with grpc.insecure_channel(wire.address) as channel:
        wire.stub = VllmEngineStub(channel)
        yield wire
    wire.tear()


def open_requests(server):
    return server.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30).active_requests


@pytest.mark.parametrize("way", ["deadline", "cancel", "abort", "reset"])
def test_the_step_that_runs_is_the_last_that_knows_of_it(server, wire, way):
    server.engine.wait_until(lambda engine: not engine.has_work)
    other = server.generate([5] * 100, stream=True)
    next(other)
    request = generate_request([6] * 500, stream=True, request_id=f"left by {way}")
    call = wire.stub.Generate(request, timeout=0.5 if way == "deadline" else 60)
    next(call)
    server.engine.gate.clear()
    server.engine.wait_until(lambda engine: engine.held)
    running, key = server.engine.steps, server.engine.submitted[-1].id
    match way:
        case "cancel":
            call.cancel()
        case "abort":
            server.stub.Abort(pb.AbortRequest(request_ids=[request.request_id]), timeout=30)
        case "reset":
            wire.tear()
    while open_requests(server) > 1:
        pass
    server.engine.gate.set()
    server.engine.wait_until(lambda engine: key in engine.cancelled)
    assert server.engine.cancelled_after == running
    loads = server.stub.GetLoads(pb.GetLoadsRequest(), timeout=30).loads
    assert [rank.num_running_reqs for rank in loads] == [1, 0]
    next(other)
    other.cancel()


def test_nothing_is_compressed_unless_a_client_wants_it(wire):
    request = generate_request([300] * 20_000, max_tokens=1, prompt_logprobs=0)
    (answer,) = wire.stub.Generate(request, timeout=60)
    assert set(answer.complete.input_logprobs.token_ids) == {300}
    assert wire.received > 40_000  # two bytes a token
