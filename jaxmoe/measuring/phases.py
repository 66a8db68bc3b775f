"""Timing an engine's own steps: prefill of a prompt, and decoding of a full batch."""

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from jaxmoe.engine.engine import Engine
from jaxmoe.engine.request import Output, Request, SamplingParams
from jaxmoe.errors import ConfigError

STEPS_BEFORE = 2  # decode steps that are not measured


class Phase(NamedTuple):
    """kind: "prefill" of one prompt of `size` tokens, or "decode" of `size` sequences; on each attention rank."""

    kind: str
    size: int

    @classmethod
    def parse(cls, text: str) -> "Phase":
        """Of "prefill:512" or "decode:8". Raises ConfigError."""
        kind, _, size = text.partition(":")
        if kind not in ("prefill", "decode") or not size.isdecimal() or not int(size):
            raise ConfigError(f"phase {text!r} is not of the form prefill:TOKENS or decode:BATCH")
        return cls(kind, int(size))

    def __str__(self) -> str:
        return f"{self.kind} of {self.size:,} tokens" if self.kind == "prefill" else f"decode at batch {self.size}"


class Timed(NamedTuple):
    """What was measured of a phase on all ranks together.

    seconds: of each prefill, over all its steps, or of each decode step. tokens: that each of them advances by, on
        average where steps draft.
    context: tokens of every sequence, on average over the measured steps.
    """

    phase: Phase
    seconds: tuple[float, ...]
    tokens: float
    context: int


Around = Callable[[int], AbstractContextManager[object]]


class Driver:
    """Runs phases on an engine that does nothing else. Prompts are random tokens, answers greedy."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self._engine, self._random = engine, random.Random(seed)
        self._ranks, self._vocabulary = engine.model.num_ranks, engine.model.config.vocab_size
        self._names = 0

    def refusal(self, phase: Phase, context: int) -> str:
        """Why the engine's limits keep it from running a phase; "" if they do not."""
        config, most = self._engine.config, self._engine.max_context
        if phase.kind == "prefill":
            return f"the context limit is {most} tokens" if phase.size >= most else ""
        if phase.size > config.max_batch:
            return f"--max-batch is {config.max_batch}"
        return f"the context limit is {most} tokens" if context > most else ""

    def run(
        self,
        phase: Phase,
        context: int,
        times: int,
        around: Around = lambda number: nullcontext(),
        recorded: AbstractContextManager[object] | None = None,
    ) -> Timed:
        """Measures `times` prefills, or decode steps that end short of `context`.

        around: the context that the measured step of a number runs in. recorded: the one that all of them run in.
        """
        recorded = recorded or nullcontext()
        if phase.kind == "prefill":
            return self._prefill(phase, times, around, recorded)
        return self._decode(phase, context, times, around, recorded)

    def _prefill(self, phase: Phase, times: int, around: Around, recorded: AbstractContextManager[object]) -> Timed:
        seconds, number = [], 0
        with recorded:
            # The first touches memory that nobody has, and is slow in a recording that has just begun.
            self._submit(1, phase.size, 1)
            self._finish()
            for _ in range(times):
                self._submit(1, phase.size, 1)
                total = 0.0
                while self._engine.has_work:
                    with around(number):
                        total += self._timed()[0]
                    number += 1
                seconds.append(total)
        return Timed(phase, tuple(seconds), phase.size * self._ranks, phase.size)

    def _decode(
        self, phase: Phase, context: int, times: int, around: Around, recorded: AbstractContextManager[object]
    ) -> Timed:
        chunk, together = self._engine.config.max_prefill_tokens, self._engine.config.max_prefill_sequences
        most = self._engine.config.decode_tokens
        room = context - 1 - most * (STEPS_BEFORE + times + phase.size // together + 2)
        # Sequences decode while others are still prefilled, about one step for every chunk.
        prompt = room * chunk // (chunk + most * phase.size)
        if prompt < 1:
            raise ConfigError(f"context={context} is too short for {times} steps of {phase}; use {context - room + 64}")
        lengths = dict.fromkeys(self._submit(phase.size, prompt, None), prompt)
        seconds = []

        def step() -> float:
            took, outputs = self._timed()
            for output in outputs:
                lengths[output.request_id] += len(output.token_ids)
            return took

        try:
            while prompt in lengths.values():
                step()
            with recorded:
                for _ in range(STEPS_BEFORE):
                    step()
                before = sum(lengths.values())
                for number in range(times):
                    with around(number):
                        seconds.append(step())
        finally:
            for request_id in lengths:
                self._engine.cancel(request_id)
            self._finish()
        after = sum(lengths.values())
        return Timed(phase, tuple(seconds), (after - before) / times, round((before + after) / 2 / len(lengths)))

    def _submit(self, each: int, prompt: int, max_tokens: int | None) -> list[str]:
        """As many requests on every rank; their names."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        names = []
        for rank in range(self._ranks):
            for _ in range(each):
                self._names += 1
                names.append(f"bench-{self._names}")
                tokens = tuple(self._random.choices(range(self._vocabulary), k=prompt))
                self._engine.submit(Request(names[-1], tokens, params, rank=rank))
        return names

    def _timed(self) -> tuple[float, list[Output]]:
        began = time.perf_counter()
        outputs = self._engine.step()
        return time.perf_counter() - began, outputs

    def _finish(self) -> None:
        while self._engine.has_work:
            self._engine.step()
