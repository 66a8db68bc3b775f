import concurrent.futures

import grpc
import pytest
from fake_engine import model_info
from harness import error_detail, generate_request, serving
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxmoe.engine.request import Constraint, SamplingParams
from jaxmoe.errors import InvalidRequestError, QueueFullError
from jaxmoe.serving.generate_request import HONOURED, LEFT_TO_CLIENT

PROMPT = [40, 41, 42, 43, 44]


def chunks_and_complete(call):
    *chunks, last = list(call)
    assert all(message.HasField("chunk") for message in chunks)
    assert last.HasField("complete")
    return [message.chunk for message in chunks], last.complete


def streamed_tokens(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


def test_deltas_add_up_to_the_answer_that_comes_whole(server):
    fields = {"max_tokens": 50, "logprobs": 0}
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
    assert server.engine.submitted[-1].params == SamplingParams(max_tokens=1)


def test_what_is_asked_for_reaches_the_engine(server):
    fields = {
        "temperature": 0.0, "top_k": 7, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5, "seed": -3,
        "frequency_penalty": -0.5, "presence_penalty": 1.25, "logit_bias": {3: 1.5, 4: -100.0}, "n": 2,
        "min_tokens": 1, "max_tokens": 2, "ignore_eos": True, "logprobs": 20, "prompt_logprobs": 0,
    }  # fmt: skip
    list(server.generate(PROMPT, stop_token_ids=[9], data_parallel_rank=1, **fields))
    request = server.engine.submitted[-1]
    assert request.rank == 1
    assert request.params == SamplingParams(stop_token_ids=(9,), **fields)


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"json_schema": '{"type": "null"}'}, Constraint("json_schema", '{"type": "null"}')),
        ({"regex": "a+"}, Constraint("regex", "a+")),
        ({"grammar": "start: /a/"}, Constraint("grammar", "start: /a/")),
        ({"structural_tag": "{}"}, Constraint("structural_tag", "{}")),
        ({"json_object": True, "grammar_from_first_token": True}, Constraint("json_object")),
        ({"choice": pb.ChoiceConstraint(choices=["a", "b"])}, Constraint("choice", choices=("a", "b"))),
    ],
)
def test_a_constraint_reaches_the_engine(server, fields, constraint):
    list(server.generate(PROMPT, max_tokens=1, **fields))
    assert server.engine.submitted[-1].params.constraint == constraint


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


@pytest.mark.parametrize("stream", [True, False])
def test_samples_come_by_index_each_to_its_own_end(server, tokenizer, stream):
    prompt = tokenizer.encode("one two END of the rest", add_special_tokens=False)
    answers = list(server.generate(prompt, stream=stream, n=3, max_tokens=60, stop=["END of the rest"], logprobs=0))
    chunks = [answer.chunk for answer in answers if answer.HasField("chunk")]
    completes = {answer.complete.index: answer.complete for answer in answers if answer.HasField("complete")}
    assert len(answers) == len(chunks) + 3
    assert completes.keys() == {0, 1, 2}
    shifted = {index: prompt[index:] + prompt[:index] for index in completes}
    for index, end in completes.items():
        own = [chunk for chunk in chunks if chunk.index == index]
        tokens = streamed_tokens(own) if stream else list(end.output_ids)
        expected = (shifted[index] * 60)[: len(tokens)]
        assert tokens == expected
        assert end.completion_tokens == len(tokens)
        assert (end.finish_reason, end.matched_stop_str) == ("stop", "END of the rest")
        told = own if stream else [end]
        assert [value for each in told for value in each.output_logprobs.token_logprobs] == [
            -n / 8 for n in range(len(tokens))
        ]
    key = server.engine.submitted[-1].id
    # Those that begin later in the prompt reach the stop string sooner, and are cancelled one by one.
    server.engine.wait_until(lambda engine: {key, (key, 2), (key, 1)} <= set(engine.cancelled))


def test_an_abort_ends_all_samples(server):
    call = server.generate(PROMPT, stream=True, n=2, request_id="two to abort")
    next(call)
    server.stub.Abort(pb.AbortRequest(request_ids=["two to abort"]), timeout=30)
    ends = [message.complete for message in call if message.HasField("complete")]
    assert {(end.index, end.finish_reason) for end in ends} == {(0, "abort"), (1, "abort")}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]], ids=len)
def test_the_likeliest_tokens_and_those_of_the_prompt_are_told(server, stream, prompt):
    answers = list(server.generate(prompt, stream=stream, max_tokens=4, logprobs=2, prompt_logprobs=3))
    told = [answer.chunk for answer in answers[:-1]] if stream else [answers[0].complete]
    top = [each for answer in told for each in answer.output_logprobs.top_logprobs]
    generated = (prompt * 4)[:4]
    assert [list(each.token_ids) for each in top] == [[token, token + 1] for token in generated]
    assert [list(each.values) for each in top] == [[-n / 8, -n / 8 - 1] for n in range(4)]
    assert not any(answer.HasField("input_logprobs") for answer in told[1:])
    of_prompt = told[0].input_logprobs
    assert of_prompt.token_ids == prompt
    assert not of_prompt.token_logprobs[0].HasField("value")
    assert [each.value for each in of_prompt.token_logprobs[1:]] == [-n for n in range(1, len(prompt))]
    expected = [[], *([0, 1, 2] for _ in prompt[1:])]
    assert [list(each.token_ids) for each in of_prompt.top_logprobs] == expected


def test_a_stop_string_counts_once_there_are_enough_tokens(server, tokenizer):
    prompt = tokenizer.encode("one END two", add_special_tokens=False)
    ((end,),) = ([answer.complete for answer in server.generate(prompt, stop=["END"], min_tokens=8, max_tokens=90)],)
    assert end.matched_stop_str == "END"
    assert 8 < end.completion_tokens <= 8 + len(prompt)


def test_truncation_keeps_the_last_tokens_of_the_prompt(server):
    list(server.generate(range(100), max_tokens=1, truncate_prompt_tokens=3))
    assert server.engine.submitted[-1].prompt == (97, 98, 99)


def test_a_prompt_of_eight_megabytes_is_taken(server):
    list(server.generate([300] * 4_200_000, max_tokens=1, truncate_prompt_tokens=3))
    assert server.engine.submitted[-1].prompt == (300, 300, 300)


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
    with serving(model_info(checkpoint, max_running=1), pace=0.001) as server:
        running = server.generate(PROMPT, stream=True)
        next(running)
        assert server.refusal(PROMPT, timeout=0.3).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        server.engine.wait_until(lambda engine: engine.cancelled)
        running.cancel()
        server.engine.wait_until(lambda engine: not engine.has_work)
        first, late = (request.id for request in server.engine.submitted)
        assert server.engine.cancelled == [late, first]
        assert server.engine.begun == [first]


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


def test_every_sampling_field_is_honoured_or_left_to_the_client():
    assert {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} == HONOURED | LEFT_TO_CLIENT


def test_a_field_of_a_later_protocol_is_refused_by_its_number(server):
    request = generate_request(PROMPT, max_tokens=1)
    request.sampling_params.MergeFromString(b"\x98\x06\x01")  # field 99 is 1
    with pytest.raises(grpc.RpcError) as error:
        list(server.stub.Generate(request, timeout=30))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "SamplingParams.99" in error.value.details()


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
    harmless = dict.fromkeys(LEFT_TO_CLIENT, True)
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
        (PROMPT, {"logprobs": 21}, "sampling_params.logprobs", "logprobs=21"),
        (PROMPT, {"logprobs": -1}, "sampling_params.logprobs", "logprobs=-1"),
        (PROMPT, {"prompt_logprobs": -1}, "sampling_params.prompt_logprobs", "prompt_logprobs=-1"),
        (PROMPT, {"min_p": 2.0}, "sampling_params.min_p", "min_p=2.0"),
        (PROMPT, {"repetition_penalty": -1.0}, "sampling_params.repetition_penalty", "repetition_penalty=-1.0"),
        (PROMPT, {"presence_penalty": 3.0}, "sampling_params.presence_penalty", "presence_penalty=3.0"),
        (PROMPT, {"frequency_penalty": -3.0}, "sampling_params.frequency_penalty", "frequency_penalty=-3.0"),
        (PROMPT, {"logit_bias": {512: 1.0}}, "sampling_params.logit_bias", "512"),
        (PROMPT, {"n": 129}, "sampling_params.n", "n=129"),
        (PROMPT, {"min_tokens": 3, "max_tokens": 2}, "sampling_params.min_tokens", "min_tokens=3"),
        (PROMPT, {"regex": "a" * 300_000}, "sampling_params.regex", "regex of 300000 characters"),
        (PROMPT, {"regex": "a", "ignore_eos": True}, "sampling_params.ignore_eos", "ignore_eos leaves regex no way"),
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


@pytest.mark.parametrize("end", ["length", "abort", "stall"])
def test_an_answer_that_nobody_reads_is_not_kept(checkpoint, end):
    limits = {"read_timeout": 0.2, "max_backlog": 10**9, "step_timeout": 0.5}
    with serving(model_info(checkpoint, max_context=10**8), **limits) as server:
        small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
        with grpc.insecure_channel(server.address, options=small_window) as channel:
            fields = {"stream": True, "logprobs": 1, "request_id": "unread"}
            if end == "length":
                fields["max_tokens"] = 10_000
            call = type(server.stub)(channel).Generate(generate_request(PROMPT, **fields), timeout=60)
            server.engine.wait_until(lambda engine: engine.generated >= 10_000)
            if end == "abort":
                server.stub.Abort(pb.AbortRequest(request_ids=["unread"]), timeout=30)
            elif end == "stall":
                server.engine.gate.clear()
            while server.stub.GetServerInfo(pb.GetServerInfoRequest()).active_requests:
                pass
            with pytest.raises(grpc.RpcError) as error:
                list(call)
        told = ("UNAVAILABLE", "a step") if end == "stall" else ("RESOURCE_EXHAUSTED", "within 0.2 s of its end")
        assert error.value.code().name == told[0]
        assert told[1] in error.value.details()


def test_without_a_tokenizer_tokens_are_served_and_text_is_refused(tmp_path):
    with serving(model_info(tmp_path)) as server:
        assert chunks_and_complete(server.generate(PROMPT, max_tokens=5))[1].output_ids == PROMPT
        for prompt, fields in (("text", {}), (PROMPT, {"stop": ["x"]})):
            error = server.refusal(prompt, **fields)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "no tokenizer.json" in error.details()
