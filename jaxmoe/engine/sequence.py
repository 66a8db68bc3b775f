"""Live samples of requests, the pieces of them that go through the model, and which of these make a step.

Imports neither jax nor numpy.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from jaxmoe.engine.pages import PageTables
from jaxmoe.engine.request import Request

NO_PAGES = PageTables(0)


@dataclasses.dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A live sample of a request and how far it has come.

    request: as submitted; that of a further sample has an id and a seed of its own.
    name: the id that was submitted. index: which of its samples this is.
    tokens: the prompt, then what was generated.
    limit: the number of tokens at which it ends, whatever they are.
    order: smaller goes first.
    root: where the names of its pages begin; None if it neither finds nor leaves any.
    first: the sample that computes the prompt before this one starts.
    rank: its attention rank; -1 while it waits.
    slot: from 1, its own among those that run on the rank: where the device keeps the token that was drawn last.
    num_computed: the first so many tokens have their keys and values in the cache.
    tables: its pages; none while it waits.
    names: of its first full pages, as far as they were asked for.
    num_stored: the first so many pages can be found by others.
    num_cached: of the prompt's tokens those that were found in the prefix cache when it first ran; -1 before.
    draft: what may come after its tokens; None if nobody drafts.
    in_flight: the last chunk that was planned, until it is complete.
    ended: it has come to its end; what is still in flight was for nothing.
    """

    request: Request
    name: str
    index: int
    tokens: list[int]
    limit: int
    order: tuple[int, int, int]
    root: bytes | None = None
    first: "Sequence | None" = None
    rank: int = -1
    slot: int = 0
    num_computed: int = 0
    tables: PageTables = NO_PAGES
    names: list[bytes] = dataclasses.field(default_factory=list)
    num_stored: int = 0
    num_cached: int = -1
    draft: int | None = None
    in_flight: "Chunk | None" = None
    ended: bool = False

    @property
    def num_planned(self) -> int:
        """The first so many tokens are computed, or in flight."""
        if self.in_flight is None:
            return self.num_computed
        return len(self.tokens) if self.in_flight.samples else self.in_flight.start + self.in_flight.length

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be planned for, with the one that what is in flight draws, unless it ends there."""
        drawn = self.in_flight is not None and self.in_flight.samples
        if drawn and len(self.tokens) + 1 >= self.limit:
            return 0
        return len(self.tokens) + drawn - self.num_planned

    @property
    def decodes(self) -> bool:
        """Only its newest token is still to be computed."""
        return self.num_planned > 0 and self.num_uncomputed == 1


class Chunk(NamedTuple):
    """`sequence.tokens[start : start + length]` go through the model; if `samples`, a token is drawn after the last.

    draft: the last of these is the sequence's draft, and not yet one of its tokens.
    ahead: so many tokens at most, with a draft two, were being drawn as it was planned. Its first token is the last of
        them, which only the device knows, as it does its draft; and if there were two, it begins one later.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    draft: bool = False
    ahead: int = 0

    @property
    def end(self) -> int:
        """The number of the sequence's tokens up to its last, at most."""
        return self.start + self.length + max(0, self.ahead - 1)

    @property
    def tokens(self) -> list[int]:
        """What goes through the model; where only the device knows it, minus twice the slot's number, less 1 for a
        draft."""
        sequence = self.sequence
        if self.ahead:
            return [-2 * sequence.slot, -2 * sequence.slot - 1][: self.length]
        own = sequence.tokens[self.start : self.start + self.length]
        return [*own, sequence.draft or 0] if self.draft else own

    @property
    def settled(self) -> "Chunk":
        """The same once all tokens are read that were drawn before it."""
        return self._replace(start=len(self.sequence.tokens) - 1, ahead=0) if self.ahead else self

    @property
    def draws(self) -> int:
        """Rows of logits: after its last token, and with a draft after the one before too."""
        return 1 + self.draft


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The work of one step, by attention rank. Every chunk in `decodes` is one token long, or two with a draft, and
    samples."""

    prefills: tuple[tuple[Chunk, ...], ...]
    decodes: tuple[tuple[Chunk, ...], ...]

    @property
    def chunks(self) -> Iterator[Chunk]:
        return (chunk for _, chunk in self.placed)

    @property
    def placed(self) -> Iterator[tuple[int, Chunk]]:
        """Every chunk with its attention rank."""
        for ranks in (self.prefills, self.decodes):
            for rank, chunks in enumerate(ranks):
                for chunk in chunks:
                    yield rank, chunk

    @property
    def empty(self) -> bool:
        return not any(self.prefills) and not any(self.decodes)


NOTHING = StepPlan((), ())
