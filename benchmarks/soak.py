"""An engine under random load for as long as asked: is the pool whole at the end, and has memory stayed flat?

    python benchmarks/soak.py [--model demo:mixtral] [--mesh dp=1,ep=1] [--seconds 600] [--pages 40]

Requests of skewed lengths come in bursts, begin alike or go on where an earlier one ended, ask for several samples,
have priorities and are cancelled, on a machine with too few pages. The pool's integrity is checked every few steps.
Prints a line every tenth of the time, and exits with 1 if a page leaked, a request did not end exactly once or memory
grew.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import jaxmoe
from jaxmoe.engine.request import Request, SamplingParams

CHECK_EVERY = 50
FLAT = 1.05  # of memory after a third of the time


def resident() -> float:
    """MiB of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Load:
    """Random requests, and what has become of them."""

    def __init__(self, engine: jaxmoe.Engine, seed: int) -> None:
        self.engine, self.random = engine, random.Random(seed)
        self.vocabulary, self.context = engine.model.config.vocab_size, engine.max_context
        self.prefixes = [self.tokens(self.context // 4) for _ in range(4)]
        self.live: dict[str, tuple[tuple[int, ...], set[int]]] = {}
        self.ended: Counter[str] = Counter()
        self.number = self.generated = 0

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.choices(range(self.vocabulary), k=count))

    def arrive(self) -> None:
        own = min(int(self.random.lognormvariate(2.5, 1.2)) + 1, self.context // 4)
        prompt = self.random.choice([(), *self.prefixes]) + self.tokens(own)
        params = SamplingParams(
            temperature=self.random.choice([0.0, 1.0]),
            max_tokens=min(int(self.random.lognormvariate(2.5, 1.0)) + 1, self.context // 4),
            n=self.random.choice([1, 1, 1, 1, 3]),
        )
        self.number += 1
        name = str(self.number)
        self.engine.submit(Request(name, prompt, params, priority=self.random.choice([0, 0, 0, -2, 3])))
        self.live[name] = prompt, set(range(params.n))

    def step(self) -> None:
        for output in self.engine.step():
            self.generated += len(output.token_ids)
            if output.finish_reason:
                prompt, left = self.live[output.request_id]
                left.remove(output.index)  # a second end is a KeyError
                self.ended[output.finish_reason] += 1
                if not left:
                    del self.live[output.request_id]
                    # The next turn of a conversation begins with this one.
                    self.prefixes[self.random.randrange(4)] = prompt[: self.context // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:mixtral")
    parser.add_argument("--mesh", default="dp=1,ep=1")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--pages", type=int, default=40, help="KV pages of a rank (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    limits = jaxmoe.EngineConfig(max_batch=16, max_context=512, max_prefill_tokens=128, pages_per_rank=args.pages)
    engine = jaxmoe.Engine(jaxmoe.load(args.model, args.mesh), limits)
    load, began, memory, told = Load(engine, args.seed), time.monotonic(), [], 0
    steps = longest = 0
    while (passed := time.monotonic() - began) < args.seconds:
        if load.random.random() < 0.1:
            for _ in range(min(load.random.randrange(1, 12), 64 - len(load.live))):
                load.arrive()
        if load.live and load.random.random() < 0.02:
            engine.cancel(load.random.choice(list(load.live)))
        before = time.monotonic()
        load.step()
        longest = max(longest, time.monotonic() - before)
        steps += 1
        if steps % CHECK_EVERY == 0:
            engine.check_integrity()
            engine.kv_events()
        if passed * 10 >= (told + 1) * args.seconds:
            told += 1
            memory.append(resident())
            stats = engine.stats()
            print(
                f"{passed:6.0f} s  {steps:7,} steps  {load.number:7,} requests  {load.generated:9,} tokens  "
                f"{stats.preemptions:6,} preemptions  {100 * stats.hit_tokens / stats.queried_tokens:3.0f}% of prompts "
                f"cached  {memory[-1]:7.1f} MiB",
                flush=True,
            )
    while engine.has_work:
        load.step()
    engine.check_integrity()
    stats = engine.stats()
    grown = memory[-1] / memory[2]
    whole = stats.used_pages == stats.running == stats.waiting == 0 and not load.live
    print(
        f"{steps:,} steps, {load.number:,} requests, {load.generated:,} tokens, {stats.preemptions:,} preemptions; "
        f"ends: {dict(load.ended)}; pool whole: {whole}; memory x{grown:.3f} since a third of the time; "
        f"compiled late: {engine.late_compiles}; longest step {longest * 1000:.0f} ms"
    )
    return 0 if whole and grown < FLAT and not engine.late_compiles else 1


if __name__ == "__main__":
    sys.exit(main())
