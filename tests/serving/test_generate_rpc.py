import concurrent.futures

import grpc
import pytest
from fake_engine import model_info
from harness import error_detail, generate_request, serving
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxmoe.errors import InvalidRequestError, QueueFullError
from jaxmoe.serving.servicer import _HONOURED, _LEFT_TO_CLIENT

PROMPT = [40, 41, 42, 43, 44]


def chunks_and_complete(call):
    *chunks, last = list(call)
    assert all(message.HasField("chunk") for message in chunks)
    assert last.HasField("complete")
    return [message.chunk for message in chunks], last.complete


def streamed_tokens(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


def test_deltas_add_up_to_the_answer_that_comes_whole(server):
    fields = {"max_tokens": 50, "logprobs": 1}
    chunks, end = chunks_and_complete(server.generate(PROMPT, stream=True, **fields))
    none, whole = chunks_and_complete(server.generate(PROMPT, stream=False, **fields))
    assert none == []
    assert streamed_tokens(chunks) == whole.output_ids == (PROMPT * 10)
    assert sum(chunk.completion_tokens for chunk in chunks) == end.completion_tokens == whole.completion_tokens == 50
    assert {chunk.prompt_tokens for chunk in chunks} == {end.prompt_tokens} == {whole.prompt_tokens} == {5}
    assert end.finish_reason == whole.finish_reason == "length"
    values = [value for chunk in chunks for value in chunk.output_logprobs.token_logprobs]
    assert values == whole.output_logprobs.token_logprobs == [-n / 8 for n in range(50)]
    assert whole.output_logprobs.token_ids == whole.output_ids


def test_no_logprobs_unless_asked_for(server):
    chunks, _ = chunks_and_complete(server.generate(PROMPT, stream=True, max_tokens=3))
    assert not any(chunk.HasField("output_logprobs") for chunk in chunks)


def test_text_is_tokenized_as_the_checkpoint_says(server, tokenizer):
    _, whole = chunks_and_complete(server.generate("one two", max_tokens=4))
    assert tokenizer.encode("one two")[0] == 0
    assert server.engine.submitted[-1].prompt == tuple(tokenizer.encode("one two"))
    assert whole.prompt_tokens == len(tokenizer.encode("one two"))


def test_zero_means_unset(server):
    list(
        server.stub.Generate(
            pb.GenerateRequest(text="one", sampling_params=pb.SamplingParams(max_tokens=1)), timeout=30
        )
    )
    params = server.engine.submitted[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (1.0, 0, 1.0, None)


def test_what_is_asked_for_reaches_the_engine(server):
    fields = {"temperature": 0.0, "top_k": 7, "top_p": 0.5, "seed": -3, "max_tokens": 2, "ignore_eos": True}
    list(server.generate(PROMPT, stop_token_ids=[9], data_parallel_rank=1, **fields))
    request = server.engine.submitted[-1]
    assert request.rank == 1
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert request.params.stop_token_ids == (9,)


def test_top_k_beyond_the_vocabulary_keeps_all(server):
    list(server.generate(PROMPT, top_k=2**32 - 1, max_tokens=1))
    assert server.engine.submitted[-1].params.top_k == 512


def test_an_end_of_sequence_token_is_sent_and_named(server):
    chunks, end = chunks_and_complete(server.generate([5, 6, 1], stream=True, max_tokens=50))
    assert streamed_tokens(chunks) == [5, 6, 1]
    assert (end.finish_reason, end.WhichOneof("matched_stop"), end.matched_token_id) == ("stop", "matched_token_id", 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_across_tokens_ends_with_the_token_that_completes_it(server, tokenizer, stream):
    text = "the story END of it"
    prompt = tokenizer.encode(text, add_special_tokens=False)
    at = text.index("END") + 2
    consumed, expected = 0, []
    for token in prompt:
        consumed += len(tokenizer.token_bytes(token))
        expected.append(token)
        if consumed > at:
            break
    assert len(tokenizer.token_bytes(expected[-1])) < len("y END")  # or nothing would cross a boundary
    chunks, end = chunks_and_complete(server.generate(prompt, stream=stream, stop=["xyz", "y END"], max_tokens=90_000))
    assert (streamed_tokens(chunks) if stream else end.output_ids) == expected
    assert (end.finish_reason, end.matched_stop_str, end.completion_tokens) == ("stop", "y END", len(expected))
    key = server.engine.submitted[-1].id
    server.engine.wait_until(lambda engine: key in engine.cancelled)


def test_truncation_keeps_the_last_tokens_of_the_prompt(server):
    list(server.generate(range(100), max_tokens=1, truncate_prompt_tokens=3))
    assert server.engine.submitted[-1].prompt == (97, 98, 99)


def test_an_abort_ends_the_stream_and_reaches_the_engine(server):
    call = server.generate(PROMPT, stream=True, request_id="to abort")
    next(call)
    key = server.engine.submitted[-1].id
    server.stub.Abort(pb.AbortRequest(request_ids=["nobody", "to abort"]), timeout=30)
    *_, last = call
    assert last.complete.finish_reason == "abort"
    server.engine.wait_until(lambda engine: key in engine.cancelled)


def test_a_cancelled_call_reaches_the_engine(server):
    call = server.generate(PROMPT, stream=True)
    next(call)
    key = server.engine.submitted[-1].id
    call.cancel()
    server.engine.wait_until(lambda engine: key in engine.cancelled)


def test_a_lost_connection_reaches_the_engine(server):
    with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = type(server.stub)(channel).Generate(generate_request(PROMPT, stream=True))
        next(call)
        key = server.engine.submitted[-1].id
    server.engine.wait_until(lambda engine: key in engine.cancelled)


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_reaches_the_engine(server, stream):
    seen = len(server.engine.submitted)
    error = server.refusal(PROMPT, stream=stream, timeout=0.5)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    key = server.engine.submitted[seen].id
    server.engine.wait_until(lambda engine: key in engine.cancelled)


def test_a_request_whose_deadline_passes_in_the_queue_never_begins(checkpoint):
    with serving(model_info(checkpoint)) as server:
        running = server.generate(PROMPT, stream=True)
        next(running)
        server.engine.gate.clear()
        assert server.refusal(PROMPT, timeout=0.3).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        server.engine.gate.set()
        server.engine.wait_until(lambda engine: len(engine.cancelled) == 1)
        (key,) = server.engine.cancelled
        assert key == server.engine.submitted[-1].id
        assert key not in server.engine.begun
        running.cancel()


def test_everything_is_free_again_after_a_cancel(server):
    call = server.generate(PROMPT * 100, stream=True)
    next(call)
    assert sum(rank.num_used_tokens for rank in server.stub.GetLoads(pb.GetLoadsRequest()).loads) >= 500
    call.cancel()
    server.engine.wait_until(lambda engine: not engine.has_work)
    report = server.stub.GetLoads(pb.GetLoadsRequest(), timeout=30)
    assert [(rank.num_total_reqs, rank.num_used_tokens) for rank in report.loads] == [(0, 0), (0, 0)]


def test_a_live_id_is_taken_and_free_again_afterwards(server):
    call = server.generate(PROMPT, stream=True, request_id="mine\n")
    next(call)
    error = server.refusal(PROMPT, request_id="mine\n")
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert r"'mine\n'" in error.details()
    server.stub.Abort(pb.AbortRequest(request_ids=["mine\n"]))
    list(call)
    _, whole = chunks_and_complete(server.generate(PROMPT, request_id="mine\n", max_tokens=1))
    assert whole.finish_reason == "length"


def set_field(field):
    """Some value for a field that is not its default."""
    if field.message_type and field.message_type.GetOptions().map_entry:
        return {3: 1.5}
    if field.message_type:
        return field.message_type._concrete_class()
    value = {field.CPPTYPE_STRING: "x", field.CPPTYPE_BOOL: True}.get(field.cpp_type, 2)
    return [value] if field.is_repeated else value


@pytest.mark.parametrize(
    "field",
    [field for field in pb.SamplingParams.DESCRIPTOR.fields if field.name not in _HONOURED | _LEFT_TO_CLIENT],
    ids=lambda field: field.name,
)
def test_a_sampling_field_that_is_not_honoured_is_refused_by_name(server, field):
    error = server.refusal(PROMPT, **{field.name: set_field(field)})
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field.name in error.details()
    assert [v.field for v in error_detail(error, "BadRequest").field_violations] == [f"sampling_params.{field.name}"]


@pytest.mark.parametrize(
    "fields",
    [
        {"mm_inputs": pb.MultimodalInputs()},
        {"extra_mm_inputs": [pb.MultimodalInputs()]},
        {"media_refs": pb.MediaRefs()},
        {"kv_transfer_params": pb.KvTransferParams(remote_host="x")},
        {"kv_transfer_params_json": '{"do_remote_decode": true}'},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_an_input_that_is_not_supported_is_refused_by_name(server, fields):
    error = server.refusal(PROMPT, **fields)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in error_detail(error, "BadRequest").field_violations] == list(fields)


def test_values_that_ask_for_nothing_pass(server):
    fields = {"n": 1, "repetition_penalty": 1.0, "min_p": 0.0, "stop": [], "logprobs": 0, "json_object": False}
    harmless = dict.fromkeys(_LEFT_TO_CLIENT, True)
    _, whole = chunks_and_complete(
        server.generate(PROMPT, max_tokens=2, kv_transfer_params_json="", **fields, **harmless)
    )
    assert whole.output_ids == PROMPT[:2]


@pytest.mark.parametrize(
    ("prompt", "fields", "path", "words"),
    [
        ([3, 512], {}, "tokenized.input_ids", "prompt token 512 at position 1 is outside the vocabulary of 512"),
        ([], {}, "tokenized.input_ids", "the prompt is empty"),
        (None, {}, "input", "neither `tokenized` nor `text`"),
        ([2] * 100_000, {}, "tokenized.input_ids", "send at most 99999"),
        ([300] * 3_000_000, {}, "tokenized.input_ids", "prompt of 3000000 tokens"),
        ("the " * 400_000, {}, "text", "send at most 99999"),
        (PROMPT, {"temperature": -1.0}, "sampling_params.temperature", "temperature=-1.0"),
        (PROMPT, {"temperature": float("nan")}, "sampling_params.temperature", "temperature=nan"),
        (PROMPT, {"top_p": 1.5}, "sampling_params.top_p", "top_p=1.5"),
        (PROMPT, {"max_tokens": 0}, "sampling_params.max_tokens", "max_tokens=0"),
        (PROMPT, {"max_tokens": 499}, "sampling_params.max_tokens", "the KV cache is 400 tokens"),
        (PROMPT, {"stop_token_ids": [600]}, "sampling_params.stop_token_ids", "600"),
        (PROMPT, {"logprobs": 5}, "sampling_params.logprobs", "logprobs=5"),
        (PROMPT, {"logprobs": -1}, "sampling_params.logprobs", "logprobs=-1"),
        (PROMPT, {"stop": [""]}, "sampling_params.stop", "0 characters"),
        (PROMPT, {"stop": ["x" * 513]}, "sampling_params.stop", "513 characters"),
        (PROMPT, {"stop": ["x"] * 33}, "sampling_params.stop", "33 stop strings"),
        (PROMPT, {"truncate_prompt_tokens": 0}, "sampling_params.truncate_prompt_tokens", "truncate_prompt_tokens=0"),
        (PROMPT, {"data_parallel_rank": 2}, "data_parallel_rank", "0..1"),
        (PROMPT, {"request_id": "x" * 513}, "request_id", "513 characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_named(server, prompt, fields, path, words):
    error = server.refusal(prompt, **fields)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()
    assert [v.field for v in error_detail(error, "BadRequest").field_violations] == [path]


def test_a_message_beyond_the_limit_is_refused(server):
    error = server.refusal("x" * (65 << 20))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()


def test_sixty_four_streams_at_once(server):
    def ask(n):
        chunks, end = chunks_and_complete(server.generate([n + 2, n + 3], stream=True, max_tokens=100))
        return streamed_tokens(chunks), end.finish_reason

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert answers == [([n + 2, n + 3] * 50, "length") for n in range(64)]


def test_a_full_queue_is_told_at_once(checkpoint):
    with serving(model_info(checkpoint, max_running=1, max_queue=2), pace=0.001) as server:
        calls = [server.generate(PROMPT, stream=True) for _ in range(3)]
        server.engine.wait_until(lambda engine: len(engine.submitted) == 3)
        error = server.refusal(PROMPT)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error_detail(error, "RetryInfo").retry_delay.seconds == 1
        assert len(server.engine.submitted) == 3
        loads = server.stub.GetLoads(pb.GetLoadsRequest(), timeout=30).loads
        assert (loads[0].num_running_reqs, sum(rank.num_waiting_reqs for rank in loads)) == (1, 2)
        for call in calls:
            call.cancel()
        server.engine.wait_until(lambda engine: not engine.has_work)


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (QueueFullError("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (InvalidRequestError("bad", "prompt"), grpc.StatusCode.INVALID_ARGUMENT),
        (ValueError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
def test_what_the_engine_refuses_disturbs_nobody_else(server, refusal, code):
    other = server.generate(PROMPT, stream=True, max_tokens=300)
    next(other)
    server.engine.refusal = refusal
    try:
        error = server.refusal(PROMPT)
    finally:
        server.engine.refusal = None
    assert error.code() is code
    assert "secret" not in error.details()
    assert chunks_and_complete(other)[1].completion_tokens == 300


def test_a_reader_that_falls_behind_is_cut_off(checkpoint):
    with serving(model_info(checkpoint, max_context=10**8), max_backlog=1000) as server:
        small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
        with grpc.insecure_channel(server.address, options=small_window) as channel:
            call = type(server.stub)(channel).Generate(generate_request(PROMPT, stream=True, logprobs=1), timeout=60)
            server.engine.wait_until(lambda engine: engine.cancelled)
            with pytest.raises(grpc.RpcError) as error:
                list(call)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "read faster" in error.value.details()


def test_an_answer_that_nobody_reads_is_not_kept(checkpoint):
    with serving(model_info(checkpoint), read_timeout=0.2) as server:
        small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
        with grpc.insecure_channel(server.address, options=small_window) as channel:
            fields = {"stream": True, "logprobs": 1, "max_tokens": 10_000}
            call = type(server.stub)(channel).Generate(generate_request(PROMPT, **fields), timeout=60)
            while server.stub.GetServerInfo(pb.GetServerInfoRequest()).active_requests or not server.engine.submitted:
                pass
            with pytest.raises(grpc.RpcError) as error:
                list(call)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "within 0.2 s of its end" in error.value.details()


def test_without_a_tokenizer_tokens_are_served_and_text_is_refused(tmp_path):
    with serving(model_info(tmp_path)) as server:
        assert chunks_and_complete(server.generate(PROMPT, max_tokens=5))[1].output_ids == PROMPT
        for prompt, fields in (("text", {}), (PROMPT, {"stop": ["x"]})):
            error = server.refusal(prompt, **fields)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "no tokenizer.json" in error.details()
