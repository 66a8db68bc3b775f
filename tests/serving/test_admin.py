import threading

import grpc
import pytest
from fake_engine import model_info
from harness import error_detail, generate_request, process, serving

from jaxmoe.errors import ConfigError, InvalidRequestError
from jaxmoe.serving.proto import admin_pb2 as pb
from jaxmoe.serving.proto.admin_pb2_grpc import AdminStub


def test_a_table_is_made_in_the_engines_process_while_it_steps(checkpoint):
    asked, go_on = threading.Event(), threading.Event()

    def tables(name, argument):
        asked.set()
        assert go_on.wait(20)
        return pb.Collectives(programs=[pb.ProgramCollectives(title=f"{name} of {argument}")]).SerializeToString()

    with serving(model_info(checkpoint), tables=tables) as server:
        answer = AdminStub(server.channel).GetCollectives.future(pb.GetCollectivesRequest(program="decode"))
        assert asked.wait(20)
        assert list(server.generate([5], max_tokens=3))[-1].complete.completion_tokens == 3
        go_on.set()
        assert answer.result(20).programs[0].title == "Collectives of decode"


def test_a_table_that_cannot_be_made_disturbs_nobody(checkpoint, capfd):
    def tables(name, argument):
        raise InvalidRequestError("no such program", "program") if argument else RuntimeError("secret")

    with serving(model_info(checkpoint), tables=tables) as server:
        admin = AdminStub(server.channel)
        with pytest.raises(grpc.RpcError) as error:
            admin.GetCollectives(pb.GetCollectivesRequest(program="x"))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [v.field for v in error_detail(error.value, "BadRequest").field_violations] == ["program"]
        with pytest.raises(grpc.RpcError) as error:
            admin.GetMesh(pb.GetMeshRequest())
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in error.value.details()
        assert list(server.generate([5], max_tokens=1))


def test_metrics_by_prefix(server):
    list(server.generate([5], max_tokens=1))
    samples = AdminStub(server.channel).GetMetrics(pb.GetMetricsRequest(prefix="vllm:request_success")).samples
    assert {sample.labels["finished_reason"] for sample in samples} == {"stop", "length", "abort", "error"}
    assert all(sample.name.startswith("vllm:request_success") for sample in samples)


def test_drain_ends_the_server_once_what_runs_has_ended(checkpoint):
    with process(checkpoint) as server:
        server.ready()
        running = server.stub.Generate(generate_request([5], stream=True, max_tokens=300), timeout=60)
        next(running)
        assert AdminStub(server.channel).Drain(pb.DrainRequest()).open_requests == 1
        with pytest.raises(grpc.RpcError, match="draining"):
            list(server.stub.Generate(generate_request([5], stream=True, max_tokens=1), timeout=30))
        *_, last = running
        assert last.complete.finish_reason == "length"
        assert server.end() == (0, "")


def test_orders_go_to_the_engine_and_come_back(checkpoint):
    """Between two steps, so that they never wait for one."""

    def orders(name, content):
        if name == "StartRebalanceRequest":
            raise ConfigError("this engine keeps no room to move experts; start it with --rebalance")
        if name == "SavePlacementRequest":
            return pb.SavePlacementResponse(path="/there").SerializeToString()
        return pb.Rebalance(trigger=name).SerializeToString()

    with serving(model_info(checkpoint), orders=orders) as server:
        admin = AdminStub(server.channel)
        running = server.generate([5], stream=True)
        next(running)
        assert admin.GetRebalance(pb.GetRebalanceRequest(), timeout=30).trigger == "GetRebalanceRequest"
        assert admin.SavePlacement(pb.SavePlacementRequest(), timeout=30).path == "/there"
        with pytest.raises(grpc.RpcError) as error:
            admin.StartRebalance(pb.StartRebalanceRequest(), timeout=30)
        running.cancel()
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "--rebalance" in error.value.details()
