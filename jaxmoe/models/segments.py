"""Runs of layers that repeat: what a program may scan over instead of writing out."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

LayerT = TypeVar("LayerT")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers start .. start + period * repeats - 1, of which those a `period` apart are alike."""

    start: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.repeats


def segments(kinds: Sequence[LayerT], longest_period: int = 8) -> list[Segment]:
    """Splits layers into segments, each as long as can be and of the shortest period that gives this length.

    >>> segments("AAABCBCBC")
    [Segment(start=0, period=1, repeats=3), Segment(start=3, period=2, repeats=3)]
    """
    found, start = [], 0
    while start < len(kinds):
        best = Segment(start, 1, 1)
        for period in range(1, min(longest_period, (len(kinds) - start) // 2) + 1):
            repeats = 1
            while kinds[start : start + period] == kinds[start + repeats * period : start + (repeats + 1) * period]:
                repeats += 1
            if repeats > 1 and period * repeats > best.period * best.repeats:
                best = Segment(start, period, repeats)
        found.append(best)
        start = best.stop
    return found
