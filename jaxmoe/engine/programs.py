"""What a compiled program is called and what it cost; the table of all that a start compiled."""

import functools
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

CACHE_HIT = "/jax/compilation_cache/cache_hits"


class Program(NamedTuple):
    """A compiled program and the wall time it took, others being compiled beside it.

    name: of its HLO module, by which a profile knows it. lowering: seconds from Python to StableHLO.
    compiling: seconds from there to machine code. cached: whether that was found in the compile cache.
    """

    title: str
    name: str
    compiled: Any
    lowering: float
    compiling: float
    cached: bool

    @property
    def seconds(self) -> float:
        return self.lowering + self.compiling


def identifier(title: str) -> str:
    """A title as a function's name.

    >>> identifier("decode batch=8 tokens=1 pages=16")
    'decode_batch8_tokens1_pages16'
    """
    return re.sub(r"\W", "_", title.replace("=", ""))


def build(title: str, lower: Callable[[str], jax.stages.Lowered], options: dict[str, Any] | None) -> Program:
    """Compiles what `lower`, told the function's name, returns. Several threads may build at once."""
    name = identifier(title)
    began = time.monotonic()
    lowered = lower(name)
    lowering = time.monotonic() - began
    hits = _hits()
    before = getattr(hits, "count", 0)
    compiled = lowered.compile(options)
    compiling = time.monotonic() - began - lowering
    return Program(title, f"jit_{name}", compiled, lowering, compiling, getattr(hits, "count", 0) > before)


@functools.cache
def _hits() -> threading.local:
    """Counts the programs that each thread finds in the compile cache, as JAX alone knows."""
    hits = threading.local()

    def listen(event: str, **_: Any) -> None:
        if event == CACHE_HIT:
            hits.count = getattr(hits, "count", 0) + 1

    jax.monitoring.register_event_listener(listen)
    return hits


def summary(programs: Sequence[Program], seconds: float) -> str:
    """One line for a log. seconds: of wall time that all took together."""
    slowest = max(programs, key=lambda program: program.seconds)
    found = sum(program.cached for program in programs)
    return (
        f"{len(programs)} programs ready in {seconds:.1f} s, {found} of them from the compile cache; "
        f"slowest: {slowest.title}, {slowest.seconds:.1f} s"
    )


def table(programs: Sequence[Program]) -> list[str]:
    """A row a program, the slowest first."""
    rows = sorted(programs, key=lambda program: -program.seconds)
    lines = [f"  {'program':<44}{'traced, s':>11}{'compiled, s':>13}  from the cache"]
    for each in rows:
        found = "yes" if each.cached else "no"
        lines.append(f"  {each.title:<44}{each.lowering:>11.2f}{each.compiling:>13.2f}  {found}")
    lowering, compiling = (
        sum(times) for times in zip(*((each.lowering, each.compiling) for each in rows), strict=True)
    )
    lines.append(f"  {f'{len(rows)} programs, several at once':<44}{lowering:>11.2f}{compiling:>13.2f}")
    return lines
