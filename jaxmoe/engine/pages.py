"""Which KV pages a sequence holds, by group. Imports neither jax nor numpy.

Layers whose attention looks equally far back form a group with pages of its own. A sequence has a table in each, from
the page with the first token that a later query may see: what lies wholly before it is given back, so that a window or
a chunk takes no more pages however long the context grows.

A full page has a name: a hash of all tokens up to its end, so that its contents can be found by whoever has the same.
"""

import dataclasses
import math
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from jaxmoe.engine.block_pool import BlockPool
from jaxmoe.engine.kv_events import RankEvents
from jaxmoe.spans import Span


@dataclasses.dataclass(frozen=True)
class PageGroup:
    """The layers whose attention has one span, and how many KV pages they have on each attention rank."""

    span: Span
    pages_per_rank: int


class PageTables:
    """A sequence's pages: in group g, token p lies in page pages[g][p // page_size - passed[g]], at p % page_size.

    end: how many pages take all tokens that have a place, from the first; the same in every group.
    passed: by group, how many of these were given back.
    """

    __slots__ = ("end", "pages", "passed")

    def __init__(self, groups: int) -> None:
        self.end = 0
        self.passed = [0] * groups
        self.pages = [array("i") for _ in range(groups)]


def pages_reached(span: Span, tokens: int, page_size: int, total: int) -> int:
    """The most pages that `tokens` consecutive queries of one sequence look into, of `total` that it has.

    >>> [pages_reached(Span("window", 8), tokens, page_size=4, total=100) for tokens in (1, 2, 6)]
    [3, 3, 4]
    """
    reach = span.reach(tokens)
    if reach is None:
        return total
    # Tokens of the first page before what is seen: a window begins anywhere, a chunk at multiples of its size.
    before = page_size - (math.gcd(span.size, page_size) if span.kind == "chunk" else 1)
    return min(total, -(-(before + reach) // page_size))


def page_name(parent: bytes, tokens: Sequence[int]) -> bytes:
    """128 bits that tell a full page apart by its tokens and, through `parent`, the name of the page before, by all
    tokens before them. Chance makes two of 2**32 pages equal once in 2**65 times."""
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


class RankPages:
    """The KV pages of one attention rank.

    events: told of the pages that can be found, of the group that sees furthest; None for nobody.
    """

    def __init__(self, groups: Sequence[PageGroup], page_size: int, events: RankEvents | None = None) -> None:
        self._page_size = page_size
        self._spans = [group.span for group in groups]
        self._events = events
        self._told = max(range(len(groups)), key=lambda group: self._spans[group].reach(1) or math.inf)
        self._pools = [
            BlockPool(group.pages_per_rank, events.removed)
            if events and index == self._told
            else BlockPool(group.pages_per_rank)
            for index, group in enumerate(groups)
        ]
        self._forgetful = [group for group, span in enumerate(self._spans) if span.reach(1) is not None]
        self._whole = [pool for span, pool in zip(self._spans, self._pools, strict=True) if span.reach(1) is None]

    @property
    def total(self) -> int:
        """Pages of all groups together."""
        return sum(pool.num_pages for pool in self._pools)

    @property
    def used(self) -> int:
        """Pages in use of all groups together."""
        return self.total - sum(pool.free_pages for pool in self._pools)

    @property
    def cached(self) -> int:
        """Pages of all groups together that nobody uses and whose contents can be found."""
        return sum(pool.evictable_pages for pool in self._pools)

    @property
    def free(self) -> list[int]:
        """Pages not in use, by group."""
        return [pool.free_pages for pool in self._pools]

    def hit(self, names: Sequence[bytes], most: int) -> int:
        """How many of the pages of these names, from the first and `most` at most, need not be computed: of each group
        all those are here that later queries see."""
        count = most
        for pool in self._whole:
            count = next((index for index in range(count) if pool.find(names[index]) is None), count)
        while count and (missing := self._missing(names, count)) is not None:
            # Whatever ends after this page and before `count` sees it too.
            count = missing
        return count

    def _missing(self, names: Sequence[bytes], count: int) -> int | None:
        """The last page that is not here of those that queries after `count` pages see."""
        for group in self._forgetful:
            pool, first = self._pools[group], self._first(group, count)
            for index in range(count - 1, first - 1, -1):
                if pool.find(names[index]) is None:
                    return index
        return None

    def _first(self, group: int, count: int) -> int:
        """The first page that queries after `count` pages see."""
        return self._spans[group].first(count * self._page_size) // self._page_size

    def shared(self, names: Sequence[bytes], count: int) -> list[int]:
        """By group, how many pages of a hit of `count` are in use, and stay so as long as a sequence that shares them.

        None where a span is short: those that share pages soon see others.
        """
        out = [0] * len(self._pools)
        for group, pool in enumerate(self._pools):
            if group not in self._forgetful:
                found = (pool.find(name) for name in names[:count])
                out[group] = sum(page is not None and pool.in_use(page) for page in found)
        return out

    def adopt(self, tables: PageTables, names: Sequence[bytes], count: int) -> None:
        """Gives a sequence without pages those of a hit of `count`."""
        tables.end = count
        for group, pool in enumerate(self._pools):
            first = self._first(group, count)
            pages = [page for name in names[first:count] if (page := pool.find(name)) is not None]
            assert len(pages) == count - first
            pool.share(pages)
            tables.passed[group] = first
            tables.pages[group].extend(pages)

    def store(
        self, tables: PageTables, names: Sequence[bytes], start: int, parent: bytes, tokens: Sequence[int]
    ) -> None:
        """Names the pages of a sequence from page `start` on, all of whose tokens are in the cache.

        names, tokens: of these pages. parent: name of the page before them.
        """
        for group, pool in enumerate(self._pools):
            first = start - tables.passed[group]
            pages = tables.pages[group][first : first + len(names)]
            stored = [pool.store(page, name) for page, name in zip(pages, names, strict=True)]
            if group == self._told and self._events is not None:
                self._tell(names, stored, parent, tokens)

    def _tell(self, names: Sequence[bytes], stored: Sequence[bool], parent: bytes, tokens: Sequence[int]) -> None:
        assert self._events is not None
        size, index = self._page_size, 0
        while index < len(names):
            end = index
            while end < len(names) and stored[end]:
                end += 1
            if end > index:
                self._events.stored(
                    names[index - 1] if index else parent, names[index:end], tokens[index * size : end * size]
                )
            index = end + 1

    def clear(self) -> None:
        """Forgets what can be found; those who hold pages keep them."""
        for pool in self._pools:
            pool.clear()
        if self._events is not None:
            self._events.cleared()

    def extend(self, tables: PageTables, tokens: int) -> bool:
        """Gives a sequence places for its first `tokens` tokens; False, and nothing given, if any group lacks them."""
        missing = -(-tokens // self._page_size) - tables.end
        if missing <= 0:
            return True
        if any(pool.free_pages < missing for pool in self._pools):
            return False
        for pages, pool in zip(tables.pages, self._pools, strict=True):
            pages.extend(pool.allocate(missing) or ())
        tables.end += missing
        return True

    def trim(self, tables: PageTables, position: int) -> None:
        """Takes back the pages that no query at `position` or after it looks into."""
        for group in self._forgetful:
            count = self._spans[group].first(position) // self._page_size - tables.passed[group]
            if count > 0:
                self._pools[group].release(tables.pages[group][:count])
                del tables.pages[group][:count]
                tables.passed[group] += count

    def release(self, tables: PageTables) -> None:
        """Takes back all pages. The tables still name them, for a step that is under way."""
        for pages, pool in zip(tables.pages, self._pools, strict=True):
            # What comes last in a sequence is given up first: without what comes before, nobody would find it.
            pool.release(reversed(pages))

    def check_integrity(self, holders: Sequence[tuple[PageTables, int, int]]) -> None:
        """Raises AssertionError unless the tables of all `holders` account for every page, and name what they must.

        holders: of each sequence on the rank its tables, how many of its tokens are in the cache, and how many will be
            once what is in flight has come to its end.
        """
        for tables, _, tokens in holders:
            assert tables.end * self._page_size >= tokens, f"{tables.end} pages do not hold {tokens} tokens"
        for group, (span, pool) in enumerate(zip(self._spans, self._pools, strict=True)):
            pool.check_integrity([tables.pages[group] for tables, _, _ in holders])
            for tables, computed, planned in holders:
                passed, size = tables.passed[group], self._page_size
                assert passed + len(tables.pages[group]) == tables.end
                assert span.first(computed) // size <= passed <= span.first(planned) // size
        if self._events is not None:
            self._events.check_integrity(self._pools[self._told].names)
