"""How far back a layer's attention looks. Imports neither jax nor numpy: the scheduler frees pages by it."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Span:
    """Which positions a query at position i sees, itself included.

    kind: "full" sees 0 .. i; "window" the last `size`; "chunk" those of its own block of `size` positions, so that the
        first of a block sees only itself.

    >>> Span("window", 4).first(9), Span("chunk", 4).first(9), Span().first(9)
    (6, 8, 0)
    """

    kind: Literal["full", "window", "chunk"] = "full"
    size: int = 0

    def first(self, position: int) -> int:
        """The first position that the query at `position` sees. Never falls as `position` grows."""
        if self.kind == "window":
            return max(0, position - self.size + 1)
        if self.kind == "chunk":
            return position // self.size * self.size
        return 0

    def reach(self, tokens: int) -> int | None:
        """The most positions that `tokens` consecutive queries see together; None: as many as the context has."""
        return None if self.kind == "full" else self.size + tokens - 1

    def __str__(self) -> str:
        return "full" if self.kind == "full" else f"{self.kind} of {self.size}"


FULL = Span()
