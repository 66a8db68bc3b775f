import builtins
import signal
import socket
import subprocess
import sys

import pytest
from fake_engine import FakeEngine, model_info
from harness import serving

import jaxmoe
from jaxmoe.client import Client
from jaxmoe.engine.request import Request
from jaxmoe.errors import CheckpointError
from jaxmoe.generate import main
from jaxmoe.serving.tokenization import Delta


@pytest.fixture
def say(monkeypatch):
    """Puts lines where a person would type them."""

    def type_in(*lines):
        typed = iter(lines)

        def read(prompt):
            try:
                line = next(typed)
            except StopIteration:
                raise EOFError from None
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return type_in


class Model:
    """In place of `jaxmoe.load` and `jaxmoe.Engine`."""

    def __init__(self, checkpoint, tokenizer):
        self.engine = FakeEngine(model_info(checkpoint))
        self.max_context = self.engine.info.max_context
        self.tokenizer = tokenizer
        self.recommended_sampling = {"temperature": 0.7, "top_p": 0.9}
        self.asked_for = None
        self.config = None

    def load(self, path, *, mesh, dtype, progress, **options):
        self.asked_for = (path, mesh, dtype)
        return self

    def engine_of(self, loaded, config, progress):
        self.config = config
        return loaded

    def generate(self, prompts, params):
        try:
            for n, prompt in enumerate(prompts):
                self.engine.submit(Request(str(n), tuple(prompt), params))
            while self.engine.has_work:
                yield from self.engine.step()
        finally:
            for n in range(len(prompts)):
                self.engine.cancel(str(n))


@pytest.fixture
def model(checkpoint, tokenizer, monkeypatch):
    model = Model(checkpoint, tokenizer)
    monkeypatch.setitem(vars(jaxmoe), "load", model.load)  # setattr would first import the real ones
    monkeypatch.setitem(vars(jaxmoe), "Engine", model.engine_of)
    monkeypatch.setattr("jaxmoe.generate.use_compile_cache", lambda folder: None)
    return model


def test_text_from_a_server_without_loading_jax(server):
    program = (
        "import sys, runpy; sys.argv[0] = 'generate'\n"
        "try: runpy.run_module('jaxmoe.generate', run_name='__main__')\n"
        "finally: assert 'jax' not in sys.modules"
    )
    arguments = ["one two", "--server", server.address, "--max-tokens", "9"]
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.startswith("one twoone two")


def test_what_is_asked_for_reaches_the_engine(server, capsys):
    options = ["--temperature", "0.5", "--top-k", "3", "--top-p", "0.25", "--seed", "7", "--max-tokens", "2"]
    assert main(["one", "--server", server.address, *options]) == 0
    params = server.engine.submitted[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.seed, params.max_tokens) == (0.5, 3, 0.25, 7, 2)


def test_what_is_not_asked_for_is_as_the_checkpoint_recommends(model, capsys):
    for options, expected in (
        ([], (0.7, 0.9)),
        (["--top-p", "0.5"], (0.7, 0.5)),
        (["--temperature", "0"], (0.0, 1.0)),
    ):
        assert main(["one", "--max-tokens", "1", *options]) == 0
        params = model.engine.submitted[-1].params
        assert (params.temperature, params.top_p) == expected


def test_without_a_recommendation_the_answer_is_greedy(server, capsys):
    assert main(["one", "--server", server.address, "--max-tokens", "1"]) == 0
    assert server.engine.submitted[-1].params.temperature == 0


@pytest.mark.parametrize("where", ["server", "in process"])
def test_a_stop_string_ends_the_text_and_is_not_shown(where, server, model, capsys):
    place = ["--server", server.address] if where == "server" else []
    assert main(["one two END of it", *place, "--stop", "xyz", "--stop", "o END", "--max-tokens", "9999"]) == 0
    assert capsys.readouterr().out == "one tw\n"
    engine = server.engine if where == "server" else model.engine
    engine.wait_until(lambda engine: not engine._live)


def test_text_in_process(model, capsys):
    flags = ["--mesh", "ep=2", "--dtype", "bfloat16", "--speculate", "mtp"]
    assert main(["one two", "--model", "PATH", *flags, "--max-tokens", "5"]) == 0
    assert model.config.speculate == "mtp"
    assert capsys.readouterr().out.startswith("one")
    assert model.asked_for == ("PATH", "ep=2", "bfloat16")


def test_the_demo_model_is_the_default(model, capsys):
    assert main(["one", "--max-tokens", "1"]) == 0
    assert model.asked_for == (None, "dp=1,ep=1", "float32")
    assert model.config.speculate is None


def test_a_conversation(server, capsys, say, tokenizer):
    say("two", "  ", "/quit", "never")
    assert main(["one", "--chat", "--server", server.address]) == 0
    assert capsys.readouterr().out == "one\none\n"
    prompt = "<s><|user|>one</s><|assistant|>one</s><|user|>two</s><|assistant|>"
    assert server.engine.submitted[-1].prompt == tuple(tokenizer.encode(prompt, add_special_tokens=False))


def test_end_of_input_leaves_and_an_interrupt_does_not(server, capsys, say):
    say(KeyboardInterrupt(), "one")
    assert main(["--chat", "--server", server.address]) == 0
    assert capsys.readouterr().out == "\n(Ctrl-D or /quit leaves)\none\n\n"


def test_a_full_context_forgets_the_oldest_exchanges_and_says_so(checkpoint, capsys, say, tokenizer):
    with serving(model_info(checkpoint, max_context=60)) as server:
        say("the rest of the story", "the other end", "the story of the end", "x" * 100, "one")
        assert main(["--chat", "--server", server.address, "--max-tokens", "12"]) == 0
        told = capsys.readouterr().err
        last = server.engine.submitted[-1].prompt
    assert "exchanges are forgotten" in told
    assert "error: prompt of" in told  # the message that no context could hold, which is dropped in turn
    assert len(last) <= 48
    assert list(last[-4:]) == tokenizer.encode("<|user|>one</s><|assistant|>", add_special_tokens=False)


def test_an_interrupt_stops_the_answer_and_keeps_what_came(model, capsys, say, monkeypatch):
    def generate(self, prompt, params=None, stop=()):
        yield Delta((5,), " first")
        signal.raise_signal(signal.SIGINT)
        yield Delta((6,), " second")
        pytest.fail("went on")

    monkeypatch.setattr("jaxmoe.generate.InProcess.stream", generate)
    handler = signal.getsignal(signal.SIGINT)
    say("/quit")
    assert main(["hello", "--chat"]) == 0
    assert capsys.readouterr().out == "first second\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_nobody_there_is_told_in_one_line(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert main(["one", "--server", address]) == 2
    assert capsys.readouterr().err == (
        f"error: no server answers at {address}; start one with `python -m jaxmoe.serve`\n"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--top-p", "2"], "top_p=2.0"), (["--seed", str(2**40)], "does not fit"), (["--max-tokens", "499"], "KV cache")],
)
def test_what_the_server_refuses_is_told_in_one_line(server, capsys, options, words):
    assert main(["one", "--server", server.address, *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert words in told
    assert told.count("\n") == 1


def test_a_checkpoint_that_cannot_be_loaded_is_told_in_one_line(model, capsys, monkeypatch):
    def load(path, **options):
        raise CheckpointError("no checkpoint at PATH")

    monkeypatch.setitem(vars(jaxmoe), "load", load)
    assert main(["one", "--model", "PATH"]) == 2
    assert capsys.readouterr().err == "error: no checkpoint at PATH\n"


@pytest.mark.parametrize(
    "arguments", [[], ["one", "--server", "x:1", "--mesh", "ep=2"], ["one", "--server", "x:1", "--speculate", "mtp"]]
)
def test_arguments_that_make_no_sense_together(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_closing_the_answer_of_a_client_cancels_it(server):
    with Client(server.address) as client:
        answer = client.stream([5, 6])
        assert next(answer).token_ids[0] == 5
        key = server.engine.submitted[-1].id
        answer.close()
        server.engine.wait_until(lambda engine: key in engine.cancelled)
