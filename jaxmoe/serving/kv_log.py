"""What the prefix caches hold, as gateways are told of it: numbered without a gap, and resumable. No jax, no grpc."""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxmoe.engine.kv_events import KvEvent, KvEventBatch


class Told(NamedTuple):
    """A batch as a subscriber gets it. blocks: those of a snapshot of its rank; None for what has just happened."""

    batch: KvEventBatch
    blocks: int | None = None


class KvLog:
    """Follows the engine's batches: keeps the last `most`, and for who comes too late for these every rank's state."""

    def __init__(self, num_ranks: int, most: int = 4096) -> None:
        self._history: deque[KvEventBatch] = deque(maxlen=max(most, num_ranks))
        # By rank, hash of a page: its parent's and its tokens.
        self._stored: list[dict[int, tuple[int | None, tuple[int, ...]]]] = [{} for _ in range(num_ranks)]
        self._last = 0
        self.changed = asyncio.Event()

    @property
    def last(self) -> int:
        """Number of the newest batch; 0 before the first."""
        return self._last

    def take(self, batches: Sequence[KvEventBatch]) -> None:
        for batch in batches:
            self._last = batch.number
            self._history.append(batch)
            for event in batch.events:
                self._apply(self._stored[batch.rank], event)
        self.changed.set()

    def since(self, number: int) -> list[Told]:
        """From this number on; or, if that was too long ago or is no number of ours, a snapshot of every rank."""
        if not self._history:
            return []
        if self._history[0].number <= max(number, 1) <= self._last + 1:
            return [Told(batch) for batch in self._history if batch.number >= number]
        # Consecutive numbers that end with the newest, after which what happens goes on.
        before = self._last - len(self._stored) + 1
        return [
            Told(KvEventBatch(before + rank, rank, (KvEvent("cleared"), *_snapshot(stored))), len(stored))
            for rank, stored in enumerate(self._stored)
        ]

    def _apply(self, stored: dict[int, tuple[int | None, tuple[int, ...]]], event: KvEvent) -> None:
        match event.kind:
            case "cleared":
                stored.clear()
            case "removed":
                for page in event.hashes:
                    stored.pop(page, None)
            case "stored":
                size, parent = len(event.token_ids) // len(event.hashes), event.parent
                for index, page in enumerate(event.hashes):
                    stored[page] = parent, event.token_ids[index * size : (index + 1) * size]
                    parent = page


def _snapshot(stored: dict[int, tuple[int | None, tuple[int, ...]]]) -> Iterator[KvEvent]:
    """All pages, parents before children."""
    told: set[int] = set()
    for page in stored:
        chain: list[int] = []
        at: int | None = page
        while at is not None and at in stored and at not in told:
            chain.append(at)
            told.add(at)
            at = stored[at][0]
        if chain:
            chain.reverse()
            tokens = tuple(token for each in chain for token in stored[each][1])
            yield KvEvent("stored", tuple(chain), stored[chain[0]][0], tokens)
