"""What the prefix caches hold, as gateways are told of it: numbered without a gap, and resumable. No jax, no grpc."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxmoe.engine.kv_events import KvEvent, KvEventBatch


class Told(NamedTuple):
    """A batch as a subscriber gets it. blocks: those of a snapshot of its rank; None for what has just happened."""

    batch: KvEventBatch
    blocks: int | None = None


class KvLog:
    """Follows the engine's batches: keeps the last `most`, and for who comes too late for these every rank's state.

    before: the number before its first. By default the microseconds since 1970, so that no number from before a restart
        is taken for one of this log's: who comes with such a one is told the state.
    """

    def __init__(self, num_ranks: int, most: int = 4096, before: int | None = None) -> None:
        self._history: deque[KvEventBatch] = deque(maxlen=max(most, num_ranks))
        # By rank, hash of a page: its parent's and its tokens.
        self._stored: list[dict[int, tuple[int | None, tuple[int, ...]]]] = [{} for _ in range(num_ranks)]
        self._before = self._last = time.time_ns() // 1000 if before is None else before
        self.changed = asyncio.Event()

    @property
    def last(self) -> int:
        """Number of the newest batch."""
        return self._last

    def take(self, batches: Sequence[KvEventBatch]) -> None:
        for batch in (each._replace(number=self._before + each.number) for each in batches):
            self._last = batch.number
            self._history.append(batch)
            for event in batch.events:
                self._apply(self._stored[batch.rank], event)
        self.changed.set()

    def since(self, number: int) -> list[Told]:
        """From this number on; or, if that was too long ago or is no number of ours, a snapshot of every rank.

        0 is the present state: all that there was, or a snapshot.
        """
        oldest = self._history[0].number if self._history else self._last + 1
        begin = number or self._before + 1
        if oldest <= begin <= self._last + 1:
            return [Told(batch) for batch in self._history if batch.number >= begin]
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
