"""Tokens a second of one stream with drafts (`speculate="mtp"`) and without, in turn over the sample texts, and whether
the tokens are the same. Ratios are of lower quartiles of a step's time, which other work on the machine touches least.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

from jaxmoe.api import load
from jaxmoe.cli import use_compile_cache
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.engine import Engine
from jaxmoe.engine.request import Request, SamplingParams

TEXTS = Path(__file__).with_name("text")
WAYS = {
    "greedy": SamplingParams(temperature=0, ignore_eos=True),
    "temperature 1": SamplingParams(temperature=1, seed=1, ignore_eos=True),
    "temperature 0.7, top-p 0.9": SamplingParams(temperature=0.7, top_p=0.9, seed=1, ignore_eos=True),
}


class Stream:
    """One engine, with one request at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds: list[float] = []
        self.tokens = 0

    def answer(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """Notes how long each step took that decodes only."""
        found: list[int] = []
        self.engine.submit(Request("stream", tuple(prompt), params))
        while self.engine.has_work:
            began = time.perf_counter()
            brought = [token for output in self.engine.step() for token in output.token_ids]
            if found and not self.engine.last_step.prefill_tokens:
                self.seconds.append(time.perf_counter() - began)
                self.tokens += len(brought)
            found += brought
        return found

    @property
    def step(self) -> float:
        return statistics.quantiles(self.seconds, n=4)[0]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / len(self.seconds) / self.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo:deepseek-v3", help="a checkpoint that drafts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of each answer (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="over all texts (default: %(default)s)")
    args = parser.parse_args()
    use_compile_cache(str(Path.home() / ".cache" / "jaxmoe" / "compiled"))
    model = load(args.model)
    config = {"max_batch": 1, "max_context": args.prompt + args.tokens, "warm_up": False}
    engines = [Engine(model, EngineConfig(**config, speculate=how)) for how in (None, "mtp")]
    prompts = [model.tokenizer.encode(path.read_text())[: args.prompt] for path in sorted(TEXTS.glob("*.txt"))]
    print(f"{'':<28}{'accepted length':>16}{'a step, ms':>18}{'tokens/s':>16}{'ratio':>8}{'same tokens':>13}")
    for title, way in WAYS.items():
        params = dataclasses.replace(way, max_tokens=args.tokens)
        for engine in engines:
            Stream(engine).answer(prompts[0], params)
        before = engines[1].stats()
        plain, drafted = map(Stream, engines)
        pairs = [
            (plain.answer(prompt, params), drafted.answer(prompt, params))
            for _ in range(args.rounds)
            for prompt in prompts
        ]
        after = engines[1].stats()
        length = 1 + (after.accepted_drafts - before.accepted_drafts) / (after.drafts - before.drafts)
        steps = f"{plain.step * 1e3:.2f}, {drafted.step * 1e3:.2f}"
        rates = f"{plain.tokens_per_second:.0f}, {drafted.tokens_per_second:.0f}"
        ratio = drafted.tokens_per_second / plain.tokens_per_second
        same = sum(one == two for one, two in pairs)
        print(
            f"{title:<28}{length:>16.2f}{steps:>18}{rates:>16}{ratio:>8.2f}{f'{same} of {len(pairs)}':>13}", flush=True
        )


if __name__ == "__main__":
    main()
