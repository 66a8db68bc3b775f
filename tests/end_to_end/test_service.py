"""The service as clients that this project did not write see it: grpcurl, and openai's through the gateway."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzzing
import grpc
import openai
import pytest
from fake_engine import model_info
from google.rpc import error_details_pb2, status_pb2
from harness import generate_request, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

import jaxmoe
from jaxmoe.serving.proto import admin_pb2
from jaxmoe.serving.proto.admin_pb2_grpc import AdminStub

ROOT = Path(__file__).parents[2]
GRPCURL = Path(sys.executable).with_name("grpcurl")
SERVICE = "vllm.grpc.engine.VllmEngine"
MAX_BATCH, MAX_QUEUE, RANKS, CONTEXT = 2, 4, 4, 512
AT_ONCE = 8  # requests of any kind
PREFILL = 60  # seconds; a server as grpc sets it up breaks off after 50
BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
TALK = [{"role": "user", "content": "Who art thou?"}]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclasses.dataclass
class Service:
    """A server and the gateway before it, as one command starts them."""

    process: subprocess.Popen
    address: str
    http: str
    log: list

    def __post_init__(self):
        self.channel = grpc.insecure_channel(self.address)
        self.stub = VllmEngineStub(self.channel)
        self.admin = AdminStub(self.channel)

    def grpcurl(self, *arguments, data=None):
        """Exit code, and its output read as JSON objects or, failing that, as text."""
        given = ["-d", json.dumps(data)] if data is not None else []
        # Options come first.
        options = [argument for argument in arguments if argument.startswith("-")]
        rest = [argument for argument in arguments if not argument.startswith("-")]
        command = [GRPCURL, "-plaintext", *options, *given, self.address, *rest]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return ran.returncode, ran.stdout, ran.stderr

    def ask(self, data):
        """The messages that Generate answers."""
        code, told, error = self.grpcurl(f"{SERVICE}/Generate", data=data)
        assert code == 0, error
        return [json.loads(part) for part in re.split(r"(?<=\n\})\n", told) if part.strip()]

    def generate(self, timeout=60, **fields):
        own = {name: fields.pop(name) for name in list(fields) if name in pb.GenerateRequest.DESCRIPTOR.fields_by_name}
        params = pb.SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **fields})
        return self.stub.Generate(pb.GenerateRequest(sampling_params=params, **own), timeout=timeout)

    def used_tokens(self):
        return sum(rank.num_used_tokens for rank in self.stub.GetLoads(pb.GetLoadsRequest(), timeout=30).loads)

    def fill(self):
        """Calls that run, as many as there is room for."""
        calls = []
        for _ in range(MAX_BATCH * RANKS):
            calls.append(self.generate(stream=True, text="In the beginning", max_tokens=490))
            next(calls[-1])
        return calls

    def open_requests(self):
        return self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30).active_requests

    def wait_for_requests(self, count):
        while self.open_requests() < count:
            pass

    def wait_until_free(self):
        deadline = time.monotonic() + 60
        while self.used_tokens():
            assert time.monotonic() < deadline


@pytest.fixture(scope="module", autouse=True)
def long_prefill(tmp_path_factory):
    """A call of which nothing comes while the other tests run, though its client pings, and what ends it."""
    with serving(model_info(tmp_path_factory.mktemp("no checkpoint")), step_timeout=3600) as server:
        server.engine.gate.clear()
        pings = {"keepalive_time_ms": 10_000, "keepalive_permit_without_calls": 1, "http2.max_pings_without_data": 0}
        with grpc.insecure_channel(
            server.address, [(f"grpc.{name}", value) for name, value in pings.items()]
        ) as channel:
            call, began = VllmEngineStub(channel).Generate(generate_request([5], max_tokens=1)), time.monotonic()

            def end():
                threading.Event().wait(began + PREFILL - time.monotonic())
                server.engine.gate.set()
                return list(call)

            yield end


@pytest.fixture(scope="module")
def service(pytestconfig, tmp_path_factory):
    inherited = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    environment = {**inherited, "JAX_COMPILATION_CACHE_DIR": str(pytestconfig.cache.mkdir("served"))}
    grpc_port, http_port = free_port(), free_port()
    limits = {"max-batch": MAX_BATCH, "max-queue": MAX_QUEUE, "max-context": CONTEXT, "max-prefill-tokens": 64}
    command = [sys.executable, "-m", "jaxmoe.gateway", "--mesh", "dp=2,ep=2", f"--http-port={http_port}"]
    command += [f"--port={grpc_port}", "--metrics-port=0", "--log-level=info", "--log-format=json"]
    placement = tmp_path_factory.mktemp("placement") / "placement.json"
    command += ["--rebalance", "--routed-experts", f"--save-placement={placement}"]
    command += [f"--{name}={value}" for name, value in limits.items()]
    command += ["--", f"--prometheus-port={free_port()}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(iter(process.stderr.readline, "")))
    reader.start()
    service = Service(process, f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}/v1", log)
    try:
        client = openai.OpenAI(base_url=service.http, api_key="none", max_retries=0)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(openai.OpenAIError):
                if [model.id for model in client.models.list()] == ["mixtral"]:
                    break
            time.sleep(0.2)
        else:
            pytest.fail(f"no gateway: {''.join(log)}")
        yield service
        # A drain: what runs ends in peace, nothing more is taken, and the gateway goes after the server.
        running = service.generate(stream=True, text="In the beginning", max_tokens=400)
        next(running)
        process.send_signal(signal.SIGTERM)
        *_, last = running
        assert last.complete.finish_reason == "length"
        assert process.wait(60) == 0
    finally:
        process.kill()
        reader.join()
        process.stderr.close()
        service.channel.close()
    assert not any("after warm-up" in line or "Traceback" in line for line in log), "".join(log)


@pytest.fixture
def client(service):
    with openai.OpenAI(base_url=service.http, api_key="none", max_retries=0) as client:
        yield client


def test_grpcurl_finds_its_way(service):
    code, told, _ = service.grpcurl("list")
    assert code == 0
    assert {SERVICE, "jaxmoe.v1.Admin", "grpc.health.v1.Health"} <= set(told.split())
    code, told, error = service.grpcurl("describe", SERVICE)
    assert code == 0, error
    assert "stream .vllm.grpc.engine.GenerateResponse" in told
    code, told, error = service.grpcurl("describe", f"{SERVICE}.Generate")
    assert code == 0, error
    assert "rpc Generate" in told


def test_grpcurl_generates_with_the_least_of_fields(service):
    asked = {"request_id": "least", "text": "In the beginning", "sampling_params": {"max_tokens": 4}}
    (answer,) = service.ask(asked)
    assert answer["complete"]["completion_tokens"] == len(answer["complete"]["output_ids"]) <= 4
    assert answer["complete"]["finish_reason"] in ("length", "stop")


def test_a_stream_adds_up_to_what_comes_whole(service):
    asked = {"text": "In the beginning", "sampling_params": {"max_tokens": 24, "seed": 7, "ignore_eos": True}}
    *chunks, end = service.ask({**asked, "stream": True})
    (whole,) = service.ask(asked)
    tokens = [token for chunk in chunks for token in chunk["chunk"]["token_ids"]]
    assert tokens == whole["complete"]["output_ids"]
    counted = sum(chunk["chunk"]["completion_tokens"] for chunk in chunks)
    assert counted == end["complete"]["completion_tokens"] == whole["complete"]["completion_tokens"] == 24


def test_health_as_a_prober_asks(service):
    for name in ("", SERVICE):
        code, told, _ = service.grpcurl("grpc.health.v1.Health/Check", data={"service": name})
        assert (code, json.loads(told)) == (0, {"status": "SERVING"})
    code, _, error = service.grpcurl("grpc.health.v1.Health/Check", data={"service": "unknown"})
    assert code != 0
    assert "NotFound" in error
    assert json.loads(service.grpcurl(f"{SERVICE}/HealthCheck", data={})[1])["healthy"]


@pytest.mark.parametrize(
    ("request_fields", "status", "field"),
    [
        ({"text": "x" * 5000}, "InvalidArgument", "text"),
        ({"tokenized": {"input_ids": [5, 4096]}}, "InvalidArgument", "tokenized.input_ids"),
        ({}, "InvalidArgument", "input"),
        ({"text": "x", "sampling_params": {"top_p": 2}}, "InvalidArgument", "sampling_params.top_p"),
        ({"text": "x", "data_parallel_rank": 4}, "InvalidArgument", "data_parallel_rank"),
        (
            {"text": "x", "sampling_params": {"json_schema": '{"not": {"type": "null"}}'}},
            "InvalidArgument",
            "sampling_params.json_schema",
        ),
        (
            {"text": "x", "kv_transfer_params_json": '{"do_remote_decode": true}'},
            "InvalidArgument",
            "kv_transfer_params_json",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_grpcurl_is_told_which_field_is_wrong(service, request_fields, status, field):
    code, _, error = service.grpcurl(f"{SERVICE}/Generate", data=request_fields)
    assert code != 0
    assert f"Code: {status}" in error
    assert f'"field": "{field}"' in error.replace('"field":"', '"field": "')


def test_what_is_not_offered_says_so(service):
    code, _, error = service.grpcurl(f"{SERVICE}/Embed", data={})
    assert code != 0
    assert "Unimplemented" in error


def test_a_full_queue_says_when_to_come_back(service):
    calls = service.fill()
    calls += [service.generate(text="In the beginning", max_tokens=400) for _ in range(MAX_QUEUE)]
    service.wait_for_requests(len(calls))
    with pytest.raises(grpc.RpcError) as error:
        list(service.generate(text="In", max_tokens=1))
    for call in calls:
        call.cancel()
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = status_pb2.Status.FromString(dict(error.value.trailing_metadata())["grpc-status-details-bin"])
    detail = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(detail)
    assert detail.retry_delay.seconds == 1
    service.wait_until_free()


@pytest.mark.parametrize("way", ["deadline", "cancel", "abort", "reset"])
def test_however_a_request_is_left_its_pages_are_free_again(service, way):
    service.wait_until_free()
    if way == "reset":
        # Killed in the middle of a stream, so that the system closes its connection.
        data = {"text": "In the beginning", "stream": True, "sampling_params": {"max_tokens": 490, "ignore_eos": True}}
        command = [GRPCURL, "-plaintext", "-d", json.dumps(data), service.address, f"{SERVICE}/Generate"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            process.kill()
    else:
        timeout = 0.3 if way == "deadline" else 60
        call = service.generate(timeout, stream=True, text="In the beginning", request_id=f"by {way}", max_tokens=490)
        with contextlib.suppress(grpc.RpcError):
            next(call)
        if way == "cancel":
            call.cancel()
        elif way == "abort":
            service.stub.Abort(pb.AbortRequest(request_ids=["nobody", "by abort"]))
            *_, last = call
            assert last.complete.finish_reason == "abort"
        else:
            with pytest.raises(grpc.RpcError) as error:
                list(call)
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    while service.open_requests():
        pass
    assert service.used_tokens() == 0  # the first that is told since has none of it


def test_a_queued_request_that_is_aborted_never_runs(service):
    calls = service.fill()
    queued = service.generate(text="In the beginning", max_tokens=4, request_id="queued")
    service.wait_for_requests(len(calls) + 1)
    service.stub.Abort(pb.AbortRequest(request_ids=["queued"]))
    (answer,) = queued
    assert (answer.complete.finish_reason, answer.complete.output_ids) == ("abort", [])
    for call in calls:
        call.cancel()
    service.wait_until_free()


def test_loads_and_server_info_tell_of_every_attention_rank(service):
    info = service.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30)
    assert (info.data_parallel_size, info.max_num_seqs) == (RANKS, MAX_BATCH * RANKS)
    call = service.generate(stream=True, text="In the beginning", max_tokens=400, data_parallel_rank=2)
    next(call)
    loads = service.stub.GetLoads(pb.GetLoadsRequest(), timeout=30).loads
    call.cancel()
    assert [load.dp_rank for load in loads] == [0, 1, 2, 3]
    assert [load.num_running_reqs for load in loads] == [0, 0, 1, 0]
    assert [load.num_used_tokens > 0 for load in loads] == [False, False, True, False]
    service.wait_until_free()


def test_an_operator_sees_how_the_model_lies_and_what_it_took(service):
    mesh = service.admin.GetMesh(admin_pb2.GetMeshRequest())
    assert (mesh.dp, mesh.ep, mesh.tp, mesh.expert_axes, mesh.attention_ranks) == (2, 2, 1, "ep", RANKS)
    assert [(device.dp, device.ep, device.attention_rank) for device in mesh.devices] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 2),
        (1, 1, 3),
    ]
    placement = service.admin.GetPlacement(admin_pb2.GetPlacementRequest())
    assert (placement.experts, placement.slots, placement.slots_per_device) == (8, 8, 4)
    assert all(sorted(mixture.slot_expert) == list(range(8)) for mixture in placement.mixtures)
    programs = service.admin.GetPrograms(admin_pb2.GetProgramsRequest())
    assert programs.late_compiles == 0
    steps = [program for program in programs.programs if program.title.startswith(("decode", "step"))]
    assert steps
    memory = service.admin.GetMemory(admin_pb2.GetMemoryRequest())
    assert memory.kv_cache_bytes > 0
    weights = {each.kind: each.bytes for each in memory.weights}
    parameters = jaxmoe.load().params
    experts = sum(leaf.nbytes for leaf in parameters["experts"].values())
    assert weights["experts"] == experts // 2  # one copy over each row of two devices
    asked = admin_pb2.GetCollectivesRequest(program=steps[0].name)
    (found,) = service.admin.GetCollectives(asked, timeout=60).programs
    assert {axis for one in found.collectives for axis in one.axes} <= {"dp", "ep"}
    assert found.collectives
    with pytest.raises(grpc.RpcError) as error:
        service.admin.GetCollectives(admin_pb2.GetCollectivesRequest(program="nothing"), timeout=60)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_operator_sees_experts_moves_them_and_keeps_where_they_are(service):
    list(service.generate(text="In the beginning", max_tokens=20))
    load = service.admin.GetExpertLoad(admin_pb2.GetExpertLoadRequest(), timeout=60)
    assert load.assignments == sum(sum(layer.experts) for layer in load.layers) > 0
    for layer in load.layers:
        assert [len(copy.devices) for copy in layer.copies] == [2, 2]
        assert sum(sum(copy.devices) for copy in layer.copies) == sum(layer.experts)
    assert 0.5 <= load.worst_balancedness <= load.balancedness <= 1
    before = service.admin.GetPlacement(admin_pb2.GetPlacementRequest())
    reversed_ones = admin_pb2.StartRebalanceRequest(
        mixtures=[
            admin_pb2.MixturePlacement(layer=mixture.layer, slot_expert=mixture.slot_expert[::-1])
            for mixture in before.mixtures
        ]
    )
    expected = list(service.generate(text="In the beginning", max_tokens=40))[-1].complete.output_ids
    running = service.generate(text="In the beginning", max_tokens=40)
    assert service.admin.StartRebalance(reversed_ones, timeout=60).trigger == "call"
    assert list(running)[-1].complete.output_ids == expected
    deadline = time.monotonic() + 60
    while (told := service.admin.GetRebalance(admin_pb2.GetRebalanceRequest(), timeout=60)).outcome == "running":
        assert time.monotonic() < deadline
    assert (told.outcome, told.moved_experts) == ("done", 8 * len(before.mixtures))
    after = service.admin.GetPlacement(admin_pb2.GetPlacementRequest())
    assert list(after.mixtures) == list(reversed_ones.mixtures)
    saved = json.loads(Path(service.admin.SavePlacement(admin_pb2.SavePlacementRequest()).path).read_text())
    assert saved["slot_expert"] == [list(mixture.slot_expert) for mixture in after.mixtures]
    list(service.generate(text="In the beginning", max_tokens=2))
    metrics = service.admin.GetMetrics(admin_pb2.GetMetricsRequest(prefix="jaxmoe:")).samples
    assert {"jaxmoe:expert_balancedness", "jaxmoe:moved_experts_total"} <= {sample.name for sample in metrics}
    reversed_ones.mixtures[0].slot_expert[0] = 99
    for wrong, status in [
        (lambda: service.admin.StartRebalance(reversed_ones, timeout=60), grpc.StatusCode.INVALID_ARGUMENT),
        (
            lambda: service.stub.StartProfile(common_pb2.StartProfileRequest(), timeout=60),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
    ]:
        with pytest.raises(grpc.RpcError) as error:
            wrong()
        assert error.value.code() is status


def test_where_each_token_went_is_streamed(service):
    prompt = pb.TokenizedInput(input_ids=range(50, 59))
    params = pb.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    request = pb.GenerateRequest(tokenized=prompt, sampling_params=params, stream=True)
    call = service.stub.Generate(request, metadata=[("jaxmoe-routed-experts", "1")], timeout=60)
    told = [admin_pb2.RoutedTokens.FromString(each.chunk.SerializeToString()).routed_experts for each in call][:-1]
    k, layers = told[0].k, told[0].layers
    assert (k, layers) == (2, len(service.admin.GetPlacement(admin_pb2.GetPlacementRequest()).mixtures))
    experts = [expert for each in told for expert in each.experts]
    assert len(experts) == (9 + 5 - 1) * layers * k
    assert set(experts) <= set(range(8))
    assert all(one != other for one, other in zip(experts[::2], experts[1::2], strict=True))


def test_a_burst_at_an_idle_server_finds_all_its_places(service):
    service.wait_until_free()
    calls = [service.generate(text="In the beginning", max_tokens=4) for _ in range(MAX_BATCH * RANKS + MAX_QUEUE)]
    assert [list(call)[-1].complete.finish_reason for call in calls] == ["length"] * len(calls)


def test_whatever_is_sent_the_server_stays_and_others_do_not_notice(service, pytestconfig):
    count, asked = pytestconfig.getoption("--fuzz"), {"text": "In the beginning", "max_tokens": 24}

    def control():
        while True:
            try:
                return list(service.generate(**asked))[-1].complete.output_ids
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:  # a place in the queue is not sure
                    return [str(error)]

    expected, over, seen = list(control()), threading.Event(), []

    def keep_asking():
        while not over.is_set():
            seen.append(list(control()))

    statuses: Counter[grpc.StatusCode] = Counter()
    wrong = []

    @settings(
        max_examples=max(1, count // AT_ONCE), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(fuzzing.calls(), min_size=AT_ONCE, max_size=AT_ONCE))
    def fuzz(calls):
        for call, status in zip(
            calls, pool.map(lambda call: fuzzing.send(service.channel, *call, 0.5), calls), strict=True
        ):
            statuses[status] += 1
            if status in BROKEN:
                wrong.append((status, call[0].full_name, call[1]))
        assert not wrong

    beside = threading.Thread(target=keep_asking)
    beside.start()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            fuzz()
    finally:
        over.set()
        beside.join()
    print(f"{sum(statuses.values())} requests: {dict(statuses)}; the control {len(seen)} times")
    assert statuses[grpc.StatusCode.OK] > 0
    assert statuses[grpc.StatusCode.INVALID_ARGUMENT] > 0
    assert all(tokens == expected for tokens in [*seen, list(control())])
    assert service.stub.HealthCheck(pb.HealthCheckRequest(), timeout=30).healthy
    service.wait_until_free()


def test_openai_passes_tools_through(client):
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer", "enum": [1, 2, 3]}},  # a weak model writes digits without end
        "required": ["n"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "count", "description": "counts", "parameters": parameters}}]
    asked = {"model": "mixtral", "messages": TALK, "tools": tools, "max_completion_tokens": 100, "temperature": 0}
    told = client.chat.completions.create(**asked, tool_choice="auto").choices[0]
    assert told.message.content or told.message.tool_calls
    # A weak model calls a function if it must: by a grammar that the gateway makes of the tools.
    for choice in ("required", {"type": "function", "function": {"name": "count"}}):
        (call,) = client.chat.completions.create(**asked, tool_choice=choice).choices[0].message.tool_calls
        assert call.function.name == "count"
        assert isinstance(json.loads(call.function.arguments)["n"], int)


def test_top_and_the_client_see_the_same_server(service):
    with jaxmoe.client.connect(service.address) as client:
        answer = client.generate("In the beginning", max_tokens=8, temperature=0)
        assert len(answer.token_ids) == 8
        assert client.chat(TALK, max_tokens=4, temperature=0, ignore_eos=True).finish_reason == "length"
    ran = subprocess.run(
        [sys.executable, "-m", "jaxmoe.top", "--server", service.address, "--once", "--interval", "0.1"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr
    assert "mixtral  serving" in ran.stdout
    assert "an expert a column" in ran.stdout


def test_a_text_is_scored_as_its_tokens_are_told(service):
    with jaxmoe.client.connect(service.address) as client:
        text = "In the beginning"
        score = client.score(text)
        answer = client.generate(text, max_tokens=3, temperature=0)
        whole = client.score([*score.token_ids, *answer.token_ids])
        assert list(score.token_ids) == client.tokenizer.encode(text)
    assert score.logprobs[0] is None
    assert all(value <= 0 for value in score.logprobs[1:])
    assert whole.logprobs[1 : len(score.logprobs)] == pytest.approx(score.logprobs[1:], abs=1e-4)
    assert whole.total < score.total
    told = service.ask({"text": text, "sampling_params": {"max_tokens": 3, "temperature": 0, "logprobs": 2}})
    logprobs = told[0]["complete"]["output_logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx(whole.logprobs[-3:], abs=1e-4)
    assert [len(top["values"]) for top in logprobs["top_logprobs"]] == [2, 2, 2]


def test_log_lines_are_json_with_the_id_of_the_request(service):
    list(service.generate(text="secret text", max_tokens=2, request_id="logged\n"))
    deadline = time.monotonic() + 30
    while not (found := [line for line in service.log if r'"logged\n"' in line]):
        assert time.monotonic() < deadline
    told = json.loads(found[0])
    assert (told["message"], told["completion_tokens"], told["finish_reason"]) == ("request ended", 2, "length")
    assert not any("secret text" in line for line in service.log)


def test_openai_completions_stream_and_whole(client):
    asked = {"model": "mixtral", "prompt": "In the beginning", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    assert whole.usage.completion_tokens == pieces[-1].usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    assert re.search("[A-Za-z]{2,}", whole.choices[0].text)


def test_openai_chat_streams_and_whole(client):
    asked = {"model": "mixtral", "messages": TALK, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True))
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content != ""
    assert 0 < whole.usage.completion_tokens <= 12


def test_openai_ends_before_a_stop_string(client, service):
    asked = {"model": "mixtral", "prompt": "In the beginning", "max_tokens": 400, "temperature": 0}
    text = client.completions.create(**asked | {"max_tokens": 40}).choices[0].text
    stop = text.split()[4]
    answer = client.completions.create(**asked, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40  # the server stopped, not the gateway alone
    service.wait_until_free()


def test_openai_gets_samples_with_log_probabilities(client):
    asked = {"model": "mixtral", "messages": TALK, "max_completion_tokens": 6, "temperature": 1, "seed": 3}
    choices = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=3).choices
    assert [choice.index for choice in choices] == [0, 1]
    for choice in choices:
        assert 0 < len(choice.logprobs.content) <= 6
        assert all(len(each.top_logprobs) == 3 for each in choice.logprobs.content)
    pieces = list(client.chat.completions.create(**asked, n=2, logprobs=True, stream=True))
    for index, choice in enumerate(choices):
        own = [piece.choices[0] for piece in pieces if piece.choices and piece.choices[0].index == index]
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        told = [each.logprob for piece in own if piece.logprobs for each in piece.logprobs.content]
        # smg sends no piece, and no log-probability, of a token that brings no text yet.
        expected = iter([each.logprob for each in choice.logprobs.content])
        assert told
        assert all(any(abs(one - other) < 1e-4 for other in expected) for one in told)


def test_a_prompt_that_was_asked_before_is_found_until_the_cache_is_flushed(service):
    def cached():
        (answer,) = service.generate(
            text="In the beginning was the word, and the word was with the king" * 2, max_tokens=2
        )
        return answer.complete.cached_tokens

    assert service.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=20), timeout=30).success
    assert cached() == 0
    assert cached() >= 16
    assert service.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=20), timeout=30).success
    assert cached() == 0
    hits = service.admin.GetMetrics(admin_pb2.GetMetricsRequest(prefix="vllm:prefix_cache_hits_total")).samples
    assert sum(sample.value for sample in hits) >= 16


def test_a_subscriber_learns_which_pages_hold_a_prompt(service):
    assert service.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=20), timeout=30).success
    events = service.stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), timeout=60)
    prompt = list(range(100, 140))
    call = service.generate(tokenized=pb.TokenizedInput(input_ids=prompt), max_tokens=1, data_parallel_rank=3)
    assert len(list(call)) == 1
    told, numbers = [], {}
    # What came before may be told first.
    while [list(block.token_ids) for block in told[-2:]] != [prompt[:16], prompt[16:32]]:
        batch = next(events)
        if batch.load.load_only:
            continue
        numbers.setdefault(batch.dp_rank, []).append(batch.sequence_number)
        for event in batch.events:
            if batch.dp_rank == 3 and event.HasField("cleared"):
                told = []
            if batch.dp_rank == 3 and event.HasField("stored"):
                told += event.stored.blocks
    assert all(of_rank == list(range(of_rank[0], of_rank[0] + len(of_rank))) for of_rank in numbers.values())
    assert service.stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=20), timeout=30).success
    cleared = next(batch for batch in events if batch.dp_rank == 3 and batch.events)
    events.cancel()
    assert cleared.events[0].HasField("cleared")


def test_openai_gets_json_of_its_schema(client):
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="mixtral",
        messages=TALK,
        max_completion_tokens=100,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content)["n"] <= 99


def test_openai_is_told_of_a_prompt_that_is_too_long(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="mixtral", prompt="word " * 4000, max_tokens=4)


def test_an_openai_client_that_leaves_ends_its_request(client, service):
    service.wait_until_free()
    stream = client.completions.create(model="mixtral", prompt="In the beginning", max_tokens=490, stream=True)
    next(iter(stream))
    stream.close()
    service.wait_until_free()


def test_sixty_four_openai_clients_at_once(client):
    def ask(n):
        prompt = "In the beginning " + "and " * (n % 7)
        asked = {"model": "mixtral", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        for _ in range(200):
            with contextlib.suppress(openai.RateLimitError):
                return client.completions.create(**asked).choices[0].text
            time.sleep(0.05)
        return None

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert len({answers[n] for n in range(0, 64, 7)}) == 1
    assert all(answers)


def test_a_client_that_pings_sees_a_long_prefill_through(long_prefill):
    (answer,) = long_prefill()
    assert answer.complete.output_ids == [5]
