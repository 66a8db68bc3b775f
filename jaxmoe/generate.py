"""`python -m jaxmoe.generate "text"`: what a model says, at the terminal; from a server, or in this process."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jaxmoe
from jaxmoe.cli import (
    StartProgress,
    access_options,
    add_access_arguments,
    add_model_arguments,
    add_speculate_argument,
    model_options,
    use_compile_cache,
)
from jaxmoe.engine.request import SamplingParams
from jaxmoe.errors import CheckpointError, InvalidRequestError, JaxmoeError
from jaxmoe.serving.tokenization import AnswerText, Delta, Tokenizer


class Source(Protocol):
    """Where answers come from.

    max_context: tokens of prompt and answer together.
    recommended_sampling: what the checkpoint recommends, by the names of SamplingParams' fields; may be empty.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def max_context(self) -> int: ...
    @property
    def recommended_sampling(self) -> Mapping[str, float]: ...
    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, stop: Sequence[str] = ()
    ) -> Iterator[Delta]: ...


class InProcess:
    """An engine of our own, which compiles a program when a step first needs it."""

    def __init__(self, model: str | None, options: dict[str, Any], speculate: str | None = None) -> None:
        """options: of `jaxmoe.load`. speculate: of `EngineConfig`."""
        progress = StartProgress()
        loaded = jaxmoe.load(model, **options, progress=progress)
        self._engine = jaxmoe.Engine(loaded, jaxmoe.EngineConfig(warm_up=False, speculate=speculate), progress)
        self.max_context = self._engine.max_context
        self.recommended_sampling: Mapping[str, float] = loaded.recommended_sampling
        self.tokenizer = loaded.tokenizer

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, stop: Sequence[str] = ()
    ) -> Iterator[Delta]:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        params = params or SamplingParams()
        text = AnswerText(self.tokenizer, stop, min_tokens=params.min_tokens)
        outputs = self._engine.generate([tokens], params)
        with contextlib.closing(outputs):  # which cancels what still runs
            for output in outputs:
                shown = text.push(output.token_ids, last=output.finish_reason is not None)
                finish_reason = "stop" if text.stopped else output.finish_reason
                yield Delta(output.token_ids, shown, finish_reason)
                if finish_reason:
                    return


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 after an error that the user can mend, 130 if interrupted."""
    options = _parse(arguments)
    try:
        with _source(options) as source:
            params = _sampling(options, source)
            if options.chat:
                _chat(source, params, options.stop, first=options.text)
            else:
                for delta in source.stream(options.text, params, options.stop):
                    print(delta.text, end="", flush=True)
                print()
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxmoe.generate", description=__doc__)
    parser.add_argument("text", nargs="?", help="what to continue; with --chat, the first message")
    parser.add_argument("--chat", action="store_true", help="hold a conversation; Ctrl-C stops an answer, /quit leaves")
    parser.add_argument(
        "--server", metavar="HOST:PORT", help="ask a running `python -m jaxmoe.serve`; else load a model"
    )
    add_access_arguments(parser)
    add_model_arguments(parser)
    add_speculate_argument(parser)
    how = parser.add_argument_group("how tokens are chosen")
    how.add_argument("--max-tokens", type=int, default=256, metavar="N", help="length of an answer (default: 256)")
    how.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy; default: as the checkpoint recommends"
    )
    how.add_argument("--top-k", type=int, metavar="K", help="among the K most likely; 0: all")
    how.add_argument("--top-p", type=float, metavar="P", help="among the likeliest that make up P; 1: all")
    how.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same tokens")
    how.add_argument("--stop", action="append", default=[], metavar="S", help="end before this string; may be repeated")
    options = parser.parse_args(arguments)
    if options.text is None and not options.chat:
        parser.error("give a text to continue, or --chat")
    of_server = ("model", "mesh", "dtype", "speculate")
    if options.server and any(getattr(options, name) != parser.get_default(name) for name in of_server):
        parser.error(
            "--model, --mesh, --dtype and --speculate are the server's to choose; leave them out with --server"
        )
    return options


def _sampling(options: argparse.Namespace, source: Source) -> SamplingParams:
    """What the options say, for the rest what the checkpoint recommends; greedy where neither says a temperature."""
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    chosen = {name: value for name, value in given.items() if value is not None}
    recommended = {} if "temperature" in chosen else source.recommended_sampling
    params: dict[str, Any] = {"temperature": 0.0, **recommended, **chosen}
    return SamplingParams(**params, seed=options.seed, max_tokens=options.max_tokens)


@contextlib.contextmanager
def _source(options: argparse.Namespace) -> Iterator[Source]:
    if options.server:
        from jaxmoe.client import connect

        with connect(options.server, **access_options(options)) as client:
            yield client
    else:  # only now is jax loaded
        use_compile_cache(options.compile_cache)
        yield InProcess(options.model, model_options(options), options.speculate)


def _chat(source: Source, params: SamplingParams, stop: Sequence[str], first: str | None) -> None:
    if not source.tokenizer.has_chat_template:
        raise CheckpointError("this checkpoint has no chat template; give a text to continue instead of --chat")
    turns: list[dict[str, str]] = []
    while True:
        try:
            message = first or input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        first = None
        if message.strip() == "/quit":
            return
        if not message.strip():
            continue
        turns.append({"role": "user", "content": message})
        try:
            answer = _answer(source.stream(_prompt(source, turns, params), params, stop))
        except InvalidRequestError as error:
            print(f"error: {error}", file=sys.stderr)
            turns.pop()
        else:
            turns.append({"role": "assistant", "content": answer})


def _prompt(source: Source, turns: list[dict[str, str]], params: SamplingParams) -> list[int]:
    """The conversation as tokens; its oldest turns go until the answer has room, up to a quarter of the context."""
    quarter = source.max_context // 4
    room, dropped = min(params.max_tokens or quarter, quarter), 0
    while True:
        tokens = source.tokenizer.encode_chat(turns)
        if len(tokens) + room <= source.max_context or len(turns) == 1:
            break
        del turns[:2]
        dropped += 1
    if dropped:
        print(f"(the context is full; the {dropped} oldest exchanges are forgotten)", file=sys.stderr)
    return tokens


def _answer(deltas: Iterator[Delta]) -> str:
    """Prints an answer as it comes, until its end or a Ctrl-C; returns what was printed."""
    answer = ""
    with _interrupts() as interrupts:
        for delta in deltas:
            text = delta.text if answer else delta.text.lstrip()
            print(text, end="", flush=True)
            answer += text
            if interrupts:
                break
    print()
    return answer


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects the first Ctrl-C, which must not tear a step of the engine apart; a second one interrupts."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)


if __name__ == "__main__":
    sys.exit(main())
