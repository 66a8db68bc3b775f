"""What the prefix caches hold, as gateways are told of it: numbered without a gap, and resumable. No jax, no grpc."""

import asyncio
import itertools
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

    Each rank's batches have numbers of their own without a gap, as smg, a subscriber, expects them.

    before: the number before the first. By default the microseconds since 1970, so that no number from before a restart
        is taken for one of this log's: who comes with such a one is told the state.
    """

    def __init__(self, num_ranks: int, most: int = 4096, before: int | None = None) -> None:
        self._history: deque[KvEventBatch] = deque(maxlen=max(most, num_ranks))
        # By rank, hash of a page: its parent's and its tokens.
        self._stored: list[dict[int, tuple[int | None, tuple[int, ...]]]] = [{} for _ in range(num_ranks)]
        self._last = [time.time_ns() // 1000 if before is None else before] * num_ranks
        self._taken = 0
        self.changed = asyncio.Event()

    def take(self, batches: Sequence[KvEventBatch]) -> None:
        for _, rank, events in batches:
            self._last[rank] += 1
            self._taken += 1
            self._history.append(KvEventBatch(self._last[rank], rank, events))
            for event in events:
                self._apply(self._stored[rank], event)
        self.changed.set()

    def begin(self, number: int) -> tuple[list[Told], int]:
        """What a subscriber that asks from this number on is told first, and the place in the log after that.

        0 is the present state: all that there was, or a snapshot of every rank. So is a number that was too long ago or
        is none of ours; and any where there are several ranks, since one cannot say how far each had come.
        """
        kept = list(self._history)
        if number and len(self._last) == 1 and (kept[0].number if kept else self._last[0] + 1) <= number:
            if number <= self._last[0] + 1:
                return [Told(batch) for batch in kept if batch.number >= number], self._taken
        elif not number and self._taken == len(kept):
            return [Told(batch) for batch in kept], self._taken
        return self._snapshots(), self._taken

    def after(self, place: int) -> tuple[list[Told], int]:
        """What came after this place, or a snapshot if that is too much; and the place after that."""
        new = self._taken - place
        if new > len(self._history):
            return self._snapshots(), self._taken
        start = len(self._history) - new
        return [Told(batch) for batch in itertools.islice(self._history, start, None)], self._taken

    def _snapshots(self) -> list[Told]:
        """With the number of the newest batch of each rank, after which what happens goes on."""
        return [
            Told(KvEventBatch(last, rank, (KvEvent("cleared"), *_snapshot(stored))), len(stored))
            for rank, (last, stored) in enumerate(zip(self._last, self._stored, strict=True))
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
