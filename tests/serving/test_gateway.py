import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import openai
import pytest
from fake_engine import model_info
from harness import process, serving

from jaxmoe import gateway
from jaxmoe.engine.kv_events import KvEvent, KvEventBatch


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def smg(*workers, policy="round_robin"):
    """The address of a gateway before these servers."""
    port = free_port()
    command = [sys.executable, "-m", "smg", "launch", f"--port={port}", "--host=127.0.0.1", f"--policy={policy}"]
    command += [f"--prometheus-port={free_port()}", "--prometheus-host=127.0.0.1", "--worker-startup-check-interval=1"]
    command += ["--log-level=error", "--block-size=16", "--worker-urls", *(f"grpc://{worker}" for worker in workers)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as running:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.kill()


def test_a_worker_that_drains_costs_no_request(checkpoint):
    with (
        process(checkpoint) as first,
        process(checkpoint) as second,
        smg(first.address, second.address) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
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


def test_a_prompt_goes_to_the_worker_that_has_its_pages(checkpoint):
    info = model_info(checkpoint, prefix_cache=True)
    with (
        serving(info) as first,
        serving(info) as second,
        smg(first.address, second.address, policy="cache_aware") as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        _wait_for_workers(client, 2)
        text = "the end of the other story, and the rest of it, one two three " * 4

        def ask():
            """Which worker is asked."""
            before = len(first.engine.submitted)
            client.completions.create(model="fake", prompt=text, max_tokens=1)
            return first if len(first.engine.submitted) > before else second

        home = ask()
        other = second if home is first else first
        tokens = home.engine.submitted[-1].prompt
        pages = len(tokens) // 16
        assert pages >= 4
        stored = KvEvent("stored", tuple(range(1, pages + 1)), None, tokens[: 16 * pages])
        other.engine.kv_batches = [KvEventBatch(1, 0, (stored,))]
        home.engine.kv_batches = [KvEventBatch(1, 0, (KvEvent("cleared"),))]
        for worker in (home, other):
            list(worker.generate([5], max_tokens=1))
        for _ in range(100):  # until the gateway has heard of it
            if ask() is other:
                break
        assert [ask() for _ in range(12)] == [other] * 12


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
