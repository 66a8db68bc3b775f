"""What gateways are told of the prefix caches, so that they send a prompt where its pages are.

Shaped after `KvEventBatch` of smg_grpc_proto's common.proto. Imports neither jax nor numpy.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple


class KvEvent(NamedTuple):
    """Full pages that can now be found, or no longer.

    kind: "stored", "removed", or "cleared": all that was stored is gone.
    hashes: of the pages, 64 bits, signed; each depends on all tokens up to the end of its page. Stored pages follow one
        another in their sequence.
    parent: hash of the page before the first stored one; None at the start of a sequence.
    token_ids: of the stored pages one after the other, equally many of each.
    """

    kind: Literal["stored", "removed", "cleared"]
    hashes: tuple[int, ...] = ()
    parent: int | None = None
    token_ids: tuple[int, ...] = ()


class KvEventBatch(NamedTuple):
    """Events of one attention rank in the order in which they happened. number: 1, 2, ... without a gap."""

    number: int
    rank: int
    events: tuple[KvEvent, ...]


def hash64(name: bytes) -> int:
    """What the world calls a page: the first 64 bits of its name."""
    return int.from_bytes(name[:8], "little", signed=True)


class RankEvents:
    """Events of one rank since they were last taken.

    Once more than `most` are untaken they are dropped, and whoever takes next is told "cleared" and then all that
    is stored: whatever is taken tells the state in full.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._stored: dict[bytes, tuple[bytes, tuple[int, ...]]] = {}  # by name, the parent's name and the tokens
        self._pending: list[KvEvent] = []
        self._dropped = False

    def stored(self, parent: bytes, names: Sequence[bytes], token_ids: Sequence[int]) -> None:
        """names, token_ids: of successive pages. parent: name of the page before them, or of the root."""
        size, before = len(token_ids) // len(names), parent
        for index, name in enumerate(names):
            self._stored[name] = before, tuple(token_ids[index * size : (index + 1) * size])
            before = name
        self._add(self._event(parent, names))

    def removed(self, name: bytes) -> None:
        del self._stored[name]
        last = self._pending[-1] if self._pending else None
        if last and last.kind == "removed" and len(last.hashes) < 64:
            self._pending[-1] = KvEvent("removed", (*last.hashes, hash64(name)))
        else:
            self._add(KvEvent("removed", (hash64(name),)))

    def cleared(self) -> None:
        self._stored.clear()
        self._pending, self._dropped = [KvEvent("cleared")], False

    def take(self) -> tuple[KvEvent, ...]:
        events = (KvEvent("cleared"), *self._snapshot()) if self._dropped else tuple(self._pending)
        self._pending, self._dropped = [], False
        return events

    def check_integrity(self, names: set[bytes]) -> None:
        """Raises AssertionError unless exactly these pages are stored."""
        assert self._stored.keys() == names, f"{len(self._stored)} pages are told of and {len(names)} are there"

    def _add(self, event: KvEvent) -> None:
        if self._dropped:
            return
        self._pending.append(event)
        if len(self._pending) > self._most:
            self._pending, self._dropped = [], True

    def _event(self, parent: bytes, names: Sequence[bytes]) -> KvEvent:
        tokens = tuple(token for name in names for token in self._stored[name][1])
        # A root has 16 bytes only where nobody is told of what follows it.
        return KvEvent("stored", tuple(map(hash64, names)), hash64(parent) if parent else None, tokens)

    def _snapshot(self) -> Iterator[KvEvent]:
        """All that is stored, what comes first in a sequence before what follows."""
        told = set()
        for name in self._stored:
            chain = []
            while name in self._stored and name not in told:
                chain.append(name)
                told.add(name)
                name = self._stored[name][0]
            if chain:
                chain.reverse()
                yield self._event(self._stored[chain[0]][0], chain)
