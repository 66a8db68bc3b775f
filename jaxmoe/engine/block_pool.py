"""Which KV pages of one attention rank are in use, and by how many. Imports neither jax nor numpy."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out page numbers 0 .. num_pages - 1 and counts their holders. Constant time per page.

    The page that has been free for longest is handed out first; a new pool hands them out in order.
    """

    def __init__(self, num_pages: int) -> None:
        self._holders = [0] * num_pages
        self._free = deque(range(num_pages))

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` free pages, each now with one holder; None, and nothing taken, when fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Adds a holder to each of these pages, which must be in use."""
        for page in pages:
            self._require_in_use(page)
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes a holder from each of these pages; a page that has none left is free."""
        for page in pages:
            self._require_in_use(page)
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def _require_in_use(self, page: int) -> None:
        if not self._holders[page]:
            raise ValueError(f"page {page} is free: it was released once too often, or never allocated")

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless `tables`, the page tables of all who live, account for every holder and page."""
        holders: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), f"a table names a page twice: {table}"
            holders.update(table)
        counted = {page: count for page, count in enumerate(self._holders) if count}
        assert counted == holders, f"pages are held as {counted}, but the tables name {dict(holders)}"
        unheld = [page for page, count in enumerate(self._holders) if not count]
        assert sorted(self._free) == unheld, f"pages {unheld} have no holder, but {sorted(self._free)} are free"
