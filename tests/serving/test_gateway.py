import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fake_engine import model_info
from grpc_health.v1 import health_pb2
from harness import process, serving
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxmoe import gateway
from jaxmoe.engine.kv_events import KvEvent, KvEventBatch


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def smg(*workers, options=("--policy=round_robin",), cwd=None):
    """A client of a gateway before these servers, or before those that its options name."""
    port = free_port()
    command = [sys.executable, "-m", "smg", "launch", f"--port={port}", "--host=127.0.0.1", "--block-size=16"]
    command += [f"--prometheus-port={free_port()}", "--prometheus-host=127.0.0.1", "--worker-startup-check-interval=1"]
    command += ["--log-level=error", *options]
    command += ["--worker-urls", *(f"grpc://{worker}" for worker in workers)] if workers else []
    environment, quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment, cwd=cwd) as running:
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
                yield client
        finally:
            running.kill()


def test_a_worker_that_drains_costs_no_request(checkpoint):
    with (
        process(checkpoint) as first,
        process(checkpoint) as second,
        smg(first.address, second.address) as client,
    ):
        # The gateway finds both before they are ready, and must take neither for what it is not yet.
        with contextlib.suppress(openai.OpenAIError):
            client.models.list()
        first.ready()
        second.ready()
        _wait_for_workers(client, 2)
        asked = {"model": "fake", "prompt": "one two", "max_tokens": 200, "stream": True}
        begun = threading.Semaphore(0)

        def ask():
            pieces = iter(client.completions.create(**asked))
            next(pieces)
            begun.release()
            return [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1]

        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask())) for _ in range(12)]
        for thread in threads[:4]:
            thread.start()
        for _ in threads[:4]:
            begun.acquire()
        first.signal(signal.SIGTERM)
        for thread in threads[4:]:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == ["length"] * 12
        assert first.end() == (0, "")


TEXT = "the end of the other story, and the rest of it, one two three " * 4


def tell(server, *events):
    """That these have happened in its prefix cache."""
    server.engine.kv_batches = [KvEventBatch(1, 0, events)]
    list(server.generate([5], max_tokens=1))  # they are told after a step


def ask(client, *servers):
    """Which of the servers is asked."""
    before = [len(server.engine.submitted) for server in servers]
    client.completions.create(model="fake", prompt=TEXT, max_tokens=1)
    (asked,) = (server for server, count in zip(servers, before, strict=True) if len(server.engine.submitted) > count)
    return asked


def stored(tokenizer, share=1.0):
    """Pages of the text, or as large a share of them."""
    tokens = tuple(tokenizer.encode(TEXT, add_special_tokens=False))
    pages = int(len(tokens) / 16 * share)
    assert pages >= 2
    return KvEvent("stored", tuple(range(1, pages + 1)), None, tokens[: 16 * pages])


def expect(client, wanted, *servers):
    """That this one is asked, once the gateway has heard of why."""
    for _ in range(300):
        with contextlib.suppress(openai.InternalServerError):
            if ask(client, *servers) is wanted:
                break
        threading.Event().wait(0.05)
    assert [ask(client, *servers) for _ in range(12)] == [wanted] * 12


def test_a_prompt_goes_to_the_worker_that_has_its_pages_though_one_restarts(checkpoint, tokenizer):
    info, port = model_info(checkpoint, prefix_cache=True), free_port()
    with contextlib.ExitStack() as ending:
        stays, restarts = ending.enter_context(serving(info)), contextlib.ExitStack()
        ending.callback(lambda: restarts.close())
        before = restarts.enter_context(serving(info, port=port))
        client = ending.enter_context(smg(stays.address, before.address, options=["--policy=cache_aware"]))
        _wait_for_workers(client, 2)
        tell(stays, KvEvent("cleared"))
        tell(before, stored(tokenizer))
        expect(client, before, stays, before)
        restarts.close()
        after = restarts.enter_context(serving(info, port=port))
        # What the one had that is gone would count for more than this.
        tell(stays, stored(tokenizer, share=0.5))
        expect(client, stays, stays, after)
        tell(after, stored(tokenizer))
        expect(client, after, stays, after)


RETRIES = ("--policy=round_robin", "--retry-max-retries=100", "--retry-max-backoff-ms=1000")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_restart_loses_nothing_that_was_not_running(checkpoint, how):
    port = free_port()
    limits = {"pace": 0.005, "port": port, "max_running": 1}
    with contextlib.ExitStack() as ending:
        first = ending.enter_context(process(checkpoint, **limits))
        first.ready()
        client = ending.enter_context(smg(f"127.0.0.1:{port}", options=RETRIES))
        _wait_for_workers(client, 1)
        asked = {"model": "fake", "prompt": "one two", "max_tokens": 100}

        def reason(answer):
            *_, last = (piece.choices[0].finish_reason for piece in answer if piece.choices)
            return last

        def ask(stream):
            answer = client.completions.create(**asked, stream=stream)
            return reason(answer if stream else [answer])

        running = iter(client.completions.create(**asked | {"max_tokens": 600}, stream=True))
        next(running)
        pool = ending.enter_context(ThreadPoolExecutor())
        queued = [pool.submit(ask, stream) for stream in (True, False)]
        while first.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30).active_requests < 3:
            pass
        changes = first.watch()
        next(changes)
        first.popen.send_signal(how)
        if how == signal.SIGTERM:
            assert next(changes).status == health_pb2.HealthCheckResponse.NOT_SERVING
            late = pool.submit(ask, True)
            assert reason(running) == "length"
        else:
            with pytest.raises(openai.APIError, match="the engine's process is gone"):
                list(running)
            late = pool.submit(ask, True)
        first.end()
        second = ending.enter_context(process(checkpoint, **limits))
        second.ready()
        assert [answer.result(60) for answer in (*queued, late)] == ["length"] * 3


def test_a_gateway_sends_requests_to_every_attention_rank(checkpoint):
    with (
        serving(model_info(checkpoint, num_ranks=3)) as server,
        smg(server.address, options=["--policy=round_robin", "--dp-aware"]) as client,
    ):
        _wait_for_workers(client, 3)
        for _ in range(6):
            client.completions.create(model="fake", prompt="one", max_tokens=1)
        assert sorted(request.rank for request in server.engine.submitted) == [0, 0, 1, 1, 2, 2]


def test_a_gateway_with_no_disk_in_common_gets_the_tokenizer_over_the_wire(
    checkpoint, tmp_path, monkeypatch, tokenizer
):
    monkeypatch.chdir(checkpoint.parent)
    with serving(model_info(checkpoint.name)) as server, smg(server.address, cwd=tmp_path) as client:
        _wait_for_workers(client, 1)
        client.completions.create(model="fake", prompt="one two", max_tokens=1)
        # smg adds no special tokens to a text.
        assert server.engine.submitted[-1].prompt == tuple(tokenizer.encode("one two", add_special_tokens=False))


def test_who_leaves_before_a_whole_answer_ends_its_request(checkpoint):
    with serving(model_info(checkpoint), pace=0.001) as server, smg(server.address) as client:
        _wait_for_workers(client, 1)
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="fake", prompt="one", max_tokens=90_000, timeout=5)
        (request,) = server.engine.submitted
        server.engine.wait_until(lambda engine: request.id in engine.cancelled)


def test_prefill_and_decode_apart_hand_over_nothing_and_answer_all_the_same(checkpoint):
    with serving(model_info(checkpoint)) as prefill, serving(model_info(checkpoint)) as decode:
        apart = ("--prefill", f"grpc://{prefill.address}", "--decode", f"grpc://{decode.address}")
        with smg(options=["--pd-disaggregation", *apart]) as client:
            _wait_for_workers(client, 2)
            answer = client.completions.create(model="fake", prompt="one", max_tokens=5)
        assert answer.choices[0].text == "one" * 5
        asked = [server.engine.submitted[0] for server in (prefill, decode)]
        assert [request.params.max_tokens for request in asked] == [1, 5]


def _wait_for_workers(client, count):
    for _ in range(300):
        with contextlib.suppress(openai.OpenAIError):
            if client.get("/../workers", cast_to=object)["total"] == count:
                return
        threading.Event().wait(0.1)
    pytest.fail("the gateway has not found its workers")


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_child_does_not_outlive_a_parent_that_is_killed():
    parent = """
import subprocess, sys, threading
from jaxmoe import gateway
with gateway._child([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], threading.Event()):
    threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"up\n"
        running.kill()
        # The child holds the other end of the pipe as long as it lives.
        assert running.stdout.read() == b""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tls-cert", "a", "--tls-key", "b"], "--tls-cert: the gateway speaks to a server in plaintext only"),
        (["--auth-token-file", "a"], "--auth-token-file"),
        (["--port", "0"], "--port 0: the gateway must know"),
        (["--http-host", "0.0.0.0"], "--insecure-bind"),
        (["--host", "0.0.0.0"], "--insecure-bind"),
    ],
)
def test_what_a_gateway_cannot_do_is_told(capsys, arguments, said):
    assert gateway.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert said in told


def test_without_the_package_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gateway.main([]) == 2
    assert "pip install 'jaxmoe[gateway]'" in capsys.readouterr().err
