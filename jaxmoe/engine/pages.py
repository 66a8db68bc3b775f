"""Which KV pages a sequence holds, by group. Imports neither jax nor numpy.

Layers whose attention looks equally far back form a group with pages of its own. A sequence has a table in each, from
the page with the first token that a later query may see: what lies wholly before it is given back, so that a window or
a chunk takes no more pages however long the context grows.
"""

import dataclasses
import math
from array import array
from collections.abc import Sequence

from jaxmoe.engine.block_pool import BlockPool
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


class RankPages:
    """The KV pages of one attention rank."""

    def __init__(self, groups: Sequence[PageGroup], page_size: int) -> None:
        self._page_size = page_size
        self._spans = [group.span for group in groups]
        self._pools = [BlockPool(group.pages_per_rank) for group in groups]
        self._forgetful = [group for group, span in enumerate(self._spans) if span.reach(1) is not None]

    @property
    def total(self) -> int:
        """Pages of all groups together."""
        return sum(pool.num_pages for pool in self._pools)

    @property
    def used(self) -> int:
        """Pages in use of all groups together."""
        return self.total - sum(pool.free_pages for pool in self._pools)

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
            pool.release(pages)

    def check_integrity(self, holders: Sequence[tuple[PageTables, int]]) -> None:
        """Raises AssertionError unless the tables of all `holders` account for every page, and name what they must.

        holders: of each sequence on the rank its tables, and how many of its tokens are in the cache.
        """
        for tables, tokens in holders:
            assert tables.end * self._page_size >= tokens, f"{tables.end} pages do not hold {tokens} tokens"
        for group, (span, pool) in enumerate(zip(self._spans, self._pools, strict=True)):
            pool.check_integrity([tables.pages[group] for tables, _ in holders])
            for tables, tokens in holders:
                assert tables.passed[group] + len(tables.pages[group]) == tables.end
                assert tables.passed[group] == span.first(tokens) // self._page_size
