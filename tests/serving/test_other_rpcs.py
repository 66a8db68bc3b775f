import asyncio
import hashlib
import json

import grpc
import pytest
from fake_engine import model_info
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from harness import generate_request, serving
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxmoe.serving.frontend import Descriptors
from jaxmoe.serving.link import Ready
from jaxmoe.serving.remote_engine import Phase, RemoteEngine
from jaxmoe.serving.servicer import Servicer
from jaxmoe.serving.tokenization import Tokenizer, read_files, unpack_files


def test_reflection_lists_and_describes_the_services(server):
    database = ProtoReflectionDescriptorDatabase(server.channel)
    assert {"vllm.grpc.engine.VllmEngine", "jaxmoe.v1.Admin", "grpc.health.v1.Health"} <= set(database.get_services())
    for symbol in ("VllmEngine", "VllmEngine.Generate", "GenerateRequest.text"):
        assert database.FindFileContainingSymbol(f"vllm.grpc.engine.{symbol}").name == "vllm_engine.proto"
    for symbol in ("vllm.grpc.engine.VllmEngine.Nothing", "vllm.grpc.engine.Nothing.Generate", "nothing"):
        with pytest.raises(KeyError):
            Descriptors().FindFileContainingSymbol(symbol)


def test_reflection_is_off_where_it_is_not_wanted(checkpoint):
    with serving(model_info(checkpoint), reflection=False) as server:
        with pytest.raises(grpc.RpcError) as error:
            ProtoReflectionDescriptorDatabase(server.channel).get_services()
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_model_info(checkpoint):
    info = model_info(checkpoint, default_sampling_params={"temperature": 0.7})
    with serving(info) as server:
        told = server.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=30)
    assert (told.model_path, told.served_model_name, told.model_type) == (str(checkpoint), "fake", "mixtral")
    assert (told.architectures, told.eos_token_ids, told.bos_token_id) == (["MixtralForCausalLM"], [1], 0)
    assert (told.max_context_length, told.max_req_input_len, told.vocab_size) == (100_000, 99_999, 512)
    assert json.loads(told.default_sampling_params_json) == {"temperature": 0.7}
    assert told.is_generation
    assert told.tokenizer_path == ""


def test_server_info(server):
    call = server.generate([5], stream=True)
    next(call)
    told = server.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30)
    call.cancel()
    assert (told.active_requests, told.data_parallel_size, told.block_size, told.max_num_seqs) == (1, 2, 16, 96)
    assert told.uptime_seconds > 0


def test_loads_are_those_of_the_engine(server):
    server.engine.wait_until(lambda engine: not engine.has_work)
    call = server.generate([5] * 160, stream=True)
    next(call)
    report = server.stub.GetLoads(pb.GetLoadsRequest(), timeout=30)
    one = server.stub.GetLoads(pb.GetLoadsRequest(dp_rank=1), timeout=30)
    call.cancel()
    assert [(rank.dp_rank, rank.num_running_reqs) for rank in report.loads] == [(0, 1), (1, 0)]
    assert 160 <= report.loads[0].num_used_tokens < report.loads[0].max_total_num_tokens == 65536
    assert report.loads[0].token_usage == report.loads[0].num_used_tokens / 65536
    assert (report.dp_rank_count, one.dp_rank_count, one.loads[0].dp_rank) == (2, 1, 1)
    assert report.loads[0].cache_hit_rate == 0.75
    assert report.loads[0].gen_throughput > 0
    assert one.loads[0].gen_throughput == 0
    assert 0 < report.loads[0].utilization < 1


def test_prompts_that_wait_are_counted_in_tokens(checkpoint):
    with serving(model_info(checkpoint, max_running=1)) as server:
        running = server.generate([5], stream=True)
        next(running)
        calls = [server.generate([5] * 10, data_parallel_rank=1), server.generate([5] * 7)]
        server.engine.wait_until(lambda engine: len(engine.submitted) == 3)
        loads = server.stub.GetLoads(pb.GetLoadsRequest(), timeout=30).loads
        assert [load.num_waiting_uncached_tokens for load in loads] == [4, 13]
        for call in (running, *calls):
            call.cancel()


def test_the_tokenizer_comes_over_the_wire(server, checkpoint):
    *chunks, last = server.stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=30)
    archive = b"".join(chunk.data for chunk in chunks) + last.data
    assert not any(chunk.sha256 for chunk in chunks)
    assert last.sha256 == hashlib.sha256(archive).hexdigest()
    assert unpack_files(archive) == read_files(checkpoint)
    assert Tokenizer(unpack_files(archive)).encode("one") == Tokenizer.load(checkpoint).encode("one")


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("Embed", pb.EmbedRequest),
    ],
)
def test_what_is_not_there_says_so(server, method, request_type):
    with pytest.raises(grpc.RpcError) as error:
        getattr(server.stub, method)(request_type(), timeout=30)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "this" in error.value.details()


def test_the_prefix_cache_is_flushed_when_nothing_runs(server):
    server.engine.wait_until(lambda engine: not engine.has_work)
    flush = server.stub.FlushCache
    assert flush(common_pb2.FlushCacheRequest(timeout_s=20), timeout=30).success
    assert server.engine.flushes == 1
    call = server.generate([5], stream=True)
    next(call)
    refused = flush(common_pb2.FlushCacheRequest(), timeout=30)
    assert (refused.success, server.engine.flushes) == (False, 1)
    assert "1 requests are open" in refused.message
    waiting = flush.future(common_pb2.FlushCacheRequest(timeout_s=20), timeout=30)
    call.cancel()
    assert waiting.result().success
    assert server.engine.flushes == 2


def test_kv_events_are_unimplemented(server):
    with pytest.raises(grpc.RpcError) as error:
        list(server.stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), timeout=30))
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path):
    with serving(model_info(tmp_path)) as server, pytest.raises(grpc.RpcError) as error:
        list(server.stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=30))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


class Aborted(Exception):
    pass


class Expired:
    """The context of a call whose deadline has passed."""

    def time_remaining(self):
        return 0.0

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def peer_identities(self):
        return None

    def invocation_metadata(self):
        return ()

    async def abort(self, code, text, details=()):
        raise Aborted(code)


def test_a_deadline_that_has_passed_never_reaches_the_engine(checkpoint):
    async def scenario():
        engine = RemoteEngine(step_timeout=60, max_backlog=10)
        engine.link.send = sent.append
        engine._receive(Ready(model_info(checkpoint)))
        async with asyncio.timeout(20):
            while engine.phase is not Phase.SERVING:
                engine.phase_changed.clear()
                await engine.phase_changed.wait()
        sent.clear()
        with pytest.raises(Aborted, match="DEADLINE_EXCEEDED"):
            await Servicer(engine)._generate(generate_request([5]), Expired())
        assert engine.num_open == 0

    sent = []
    asyncio.run(scenario())
    assert sent == []


def test_answers_that_are_no_models_say_so(checkpoint, server):
    with serving(model_info(checkpoint, invalid="outputs are invalid: routing is simulated (uniform)")) as invalid:
        call = invalid.generate([5], stream=True, max_tokens=3)
        assert dict(call.initial_metadata())["jaxmoe-invalid"] == "outputs are invalid: routing is simulated (uniform)"
        list(call)
    call = server.generate([5], max_tokens=3)
    list(call)
    assert "jaxmoe-invalid" not in dict(call.initial_metadata())


@pytest.mark.parametrize("method", ["Generate", "GetLoads", "SubscribeKvEvents"])
def test_bytes_that_are_no_message_are_refused_and_logged_nowhere(server, capfd, method):
    streams = server.channel.unary_stream if method != "GetLoads" else server.channel.unary_unary
    call = streams(f"/vllm.grpc.engine.VllmEngine/{method}", request_serializer=None, response_deserializer=None)
    with pytest.raises(grpc.RpcError) as error:
        list(call(b"\xff\xff", timeout=30))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "reflection" in error.value.details()
    assert capfd.readouterr().err == ""
