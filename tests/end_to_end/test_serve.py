"""The real server, as a process, with the embedded model on eight virtual devices."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import jaxmoe
from jaxmoe.demo import DEMO_MODEL
from jaxmoe.engine.request import Constraint, SamplingParams
from jaxmoe.errors import InvalidRequestError, JaxmoeError
from jaxmoe.serving.client import Client
from jaxmoe.serving.tokenization import Tokenizer

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "benchmarks" / "text"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def environment(pytestconfig) -> dict[str, str]:
    """A user's, without what the tests set for JAX in this process; but compiled programs are kept between runs."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    return {**inherited, "JAX_COMPILATION_CACHE_DIR": str(pytestconfig.cache.mkdir("served"))}


def serve(*arguments: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxmoe.serve", "--port", "0", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)


@contextlib.contextmanager
def serving(*arguments: str, env: dict[str, str]) -> Iterator[str]:
    """The address of a server that is ready; checks afterwards that SIGTERM ends it cleanly."""
    with serve(*arguments, env=env) as process:
        said = ""
        for line in process.stderr:
            said += line
            if ready := re.search(r"ready on (\S+) after", line):
                break
        else:
            pytest.fail(f"the server ended with {process.wait()}:\n{said}")
        yield ready[1]
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
        assert "after warm-up" not in rest


@pytest.fixture(scope="module")
def server(pytestconfig):
    limits = ("--max-batch", "8", "--max-context", "128", "--max-prefill-tokens", "64")
    with serving("--mesh", "dp=2,ep=4", *limits, env=environment(pytestconfig)) as address:
        yield address


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEMO_MODEL)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """64 prompts of several lengths, from every domain of the sample texts."""
    domains = [tokenizer.encode(file.read_text()[:20_000]) for file in sorted(TEXT.glob("*.txt"))]
    return [domains[i % len(domains)][53 * i : 53 * i + 3 + i] for i in range(64)]


def tokens_of(client, prompt, params=GREEDY):
    return [token for delta in client.generate(prompt, params) for token in delta.token_ids]


def test_64_concurrent_streams_bring_the_same_greedy_tokens_as_one_by_one(server, prompts):
    with Client(server) as client:
        alone = [tokens_of(client, prompt) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(lambda prompt: tokens_of(client, prompt), prompts))
    assert all(len(tokens) == GREEDY.max_tokens for tokens in alone)
    assert together == alone


def test_requests_that_ask_for_much_are_served_beside_plain_ones(server, prompts):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 999}, "kind": {"enum": ["a", "b"]}},
              "required": ["n", "kind"], "additionalProperties": False,
              "x-guidance": {"whitespace_flexible": False}}  # fmt: skip
    constraint = Constraint("json_schema", json.dumps(schema))
    penalised = dataclasses.replace(GREEDY, repetition_penalty=1.5, logit_bias={5: -3.0}, min_tokens=3)
    with Client(server) as client:

        def answer(index):
            if index % 3 == 0:
                params = SamplingParams(temperature=1.0, seed=index, max_tokens=60, constraint=constraint)
                return "".join(delta.text for delta in client.generate(prompts[index], params))
            return tokens_of(client, prompts[index], penalised if index % 3 == 1 else GREEDY)

        alone = [answer(index) for index in range(9)]
        with ThreadPoolExecutor(9) as pool:
            together = list(pool.map(answer, range(9)))
        assert together == alone
        for text in alone[::3]:
            value = json.loads(text)
            assert value["n"] <= 999
            assert value["kind"] in ("a", "b")
        with pytest.raises(InvalidRequestError, match="json_schema cannot be followed: Invalid type: nonsense"):
            list(
                client.generate(
                    prompts[0], SamplingParams(constraint=Constraint("json_schema", '{"type": "nonsense"}'))
                )
            )


def test_a_client_that_knows_nothing_but_the_address_streams_text(server, tokenizer):
    """As grpcurl does: messages from reflection, fields left out mean unset."""
    with grpc.insecure_channel(server) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("vllm.grpc.engine.VllmEngine").FindMethodByName("Generate")
        request_type, response_type = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        generate = channel.unary_stream(
            "/vllm.grpc.engine.VllmEngine/Generate",
            request_serializer=request_type.SerializeToString,
            response_deserializer=response_type.FromString,
        )
        request = request_type(text="In the beginning", stream=True)
        request.sampling_params.max_tokens = 16
        request.sampling_params.temperature = 0
        responses = list(generate(request, timeout=60))
    chunks = [response.chunk for response in responses if response.HasField("chunk")]
    assert len(chunks) > 1
    assert responses[-1].complete.finish_reason in ("length", "stop")
    text = tokenizer.decode([token for chunk in chunks for token in chunk.token_ids])
    assert re.search(r"[A-Za-z]{2,}", text)


def test_128_devices_answer_as_eight_do(server, pytestconfig, prompts):
    limits = ("--max-batch", "1", "--max-context", "128", "--max-prefill-tokens", "64")
    with Client(server) as client:
        expected = [tokens_of(client, prompt) for prompt in prompts[:3]]
    with serving("--mesh", "dp=8,ep=16", *limits, env=environment(pytestconfig)) as address, Client(address) as client:
        assert [tokens_of(client, prompt) for prompt in prompts[:3]] == expected


@pytest.mark.parametrize(("name", "mesh"), [("deepseek-v3", "ep=4"), ("llama4", "dp=2,ep=2")])
def test_every_embedded_model_answers_as_it_does_in_this_process(pytestconfig, tokenizer, name, mesh):
    # Llama 4's answer begins in one chunk of its attention and ends in the next.
    prompt = tokenizer.encode((TEXT / "prose.txt").read_text()[:2000])[:120]
    params = dataclasses.replace(GREEDY, max_tokens=24)
    limits = ("--max-batch", "2", "--max-context", "256", "--max-prefill-tokens", "64")
    expected = jaxmoe.load(f"demo:{name}").greedy(prompt, params.max_tokens)
    arguments = ("--model", f"demo:{name}", "--mesh", mesh, *limits)
    with serving(*arguments, env=environment(pytestconfig)) as address, Client(address) as client:
        assert tokens_of(client, prompt, params) == expected
        assert re.search(r"[A-Za-z]{2,}", tokenizer.decode(expected))


def test_a_model_of_random_weights_answers_tokens_with_tokens(pytestconfig):
    preset = "llama-4-maverick:scale=128,num_hidden_layers=4,vocab_size=128,num_local_experts=4,head_dim=16"
    limits = ("--max-batch", "1", "--max-context", "64", "--max-prefill-tokens", "16")
    expected = jaxmoe.load(random_weights=preset).greedy([5, 6, 7], 8)
    arguments = ("--random-weights", preset, "--mesh", "ep=2", *limits)
    with serving(*arguments, env=environment(pytestconfig)) as address, Client(address) as client:
        assert tokens_of(client, [5, 6, 7]) == expected
        with pytest.raises(JaxmoeError, match="no tokenizer"):
            tokens_of(client, "text")


def test_a_bad_request_is_explained_and_the_others_go_on_unchanged(server, prompts):
    with Client(server) as client:
        expected = tokens_of(client, prompts[5])
        running = client.generate(prompts[5], GREEDY)
        tokens = list(next(running).token_ids)
        with pytest.raises(InvalidRequestError, match="prompt of 128 tokens leaves no room"):
            tokens_of(client, [5] * 128)
        with pytest.raises(InvalidRequestError, match="token 4096 at position 1"):
            tokens_of(client, [5, 4096])
        with pytest.raises(InvalidRequestError, match="top_p"):
            tokens_of(client, [5], SamplingParams(top_p=2))
        tokens += [token for delta in running for token in delta.token_ids]
    assert tokens == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["--model", "demo:gpt"], "demo:gpt is not a demo model; use demo:mixtral or demo:deepseek-v3"),
        (["--random-weights", "gpt-4"], "'gpt-4' is not a known model; use one of mixtral-8x7b"),
        (["--mesh", "ep=4,xp=2"], "'xp=2' is not one of dp=N, ep=N, tp=N"),
        (["--mesh", "tp=5"], "tp=5 divides none of heads=4, vocab=4096, kv_heads=2, expert_width=216; use tp in 1, 2"),
        (["--dispatch", "ragged_all_to_all"], "dispatch='ragged_all_to_all' is not implemented on cpu"),
        (["--max-batch", "0"], "max_batch=0 must be a whole number of at least 1"),
        (["--host", "0.0.0.0"], "--insecure-bind"),
        (["--port", "99999"], "--port 99999 is not in 0..65535"),
        (["--max-context", "5000"], "max_context=5000 is beyond the model's 1024 positions; use at most 1024"),
    ],
)
def test_a_server_that_cannot_start_says_why_and_what_to_do(pytestconfig, arguments, said):
    with serve(*arguments, env=environment(pytestconfig)) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said in error
    assert "Traceback" not in error


def test_the_readme_example_runs(pytestconfig):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    command = [sys.executable, "-c", example.replace("jaxmoe.Engine(model)", "jaxmoe.Engine(model, SMALL)")]
    command[-1] = command[-1].replace(
        "import jaxmoe\n", "import jaxmoe\nSMALL = jaxmoe.EngineConfig(warm_up=False)\n", 1
    )
    ran = subprocess.run(command, env=environment(pytestconfig), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "(1, 3, 4096)" in ran.stdout
