"""jaxmoe's worker: the engine in process, as `python -m jaxmoe.serve` runs it."""

import itertools
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import protocol

import jaxmoe
from jaxmoe.engine.config import EngineConfig
from jaxmoe.engine.request import Request, SamplingParams

# About as many tokens of KV cache as the peers have, who find no prefix there either.
CONFIG = EngineConfig(
    max_batch=protocol.SERVED,
    max_context=protocol.MAX_CONTEXT,
    max_prefill_tokens=2048,
    pages_per_rank=2048,
    prefix_cache=False,
)


class Jaxmoe:
    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        self.model = jaxmoe.load(folder, dtype=dtype)
        self.engine = jaxmoe.Engine(self.model, CONFIG)
        self.names = itertools.count()

    def steps(self, prompts: protocol.Prompts, lengths: Sequence[int]) -> Iterator[protocol.Step]:
        rows = {}
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            name = str(next(self.names))
            rows[name] = row
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            self.engine.submit(Request(name, tuple(prompt), params))
        while self.engine.has_work:
            outputs = self.engine.step()
            if step := [(rows[output.request_id], token) for output in outputs for token in output.token_ids]:
                yield step

    def prepare(self, phase: str) -> None:
        pass

    def logits(self, prompt: Sequence[int]) -> list[float]:
        return self.model.logits([prompt])[0, -1].tolist()

    def describe(self) -> str:
        return f"jaxmoe {version('jaxmoe')}, jax {jax.__version__}: {self.engine.describe()}"


if __name__ == "__main__":
    protocol.serve(Jaxmoe)
