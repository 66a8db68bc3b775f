"""Which KV pages of one attention rank are in use, by how many, and what can be found there.

Imports neither jax nor numpy.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Hands out page numbers 0 .. num_pages - 1 and counts their holders. Constant time per page.

    A page whose contents have a name (`store`) keeps them when its last holder releases it, and can be found and held
    again (`find`, `share`), until it is handed out anew. Nameless pages go first, the one that has been free for
    longest before the others, so that a new pool hands them out in order; then named ones, the least recently released
    first.

    on_evict: told the name of every page whose contents are given up.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[bytes], object] = lambda name: None) -> None:
        self._on_evict = on_evict
        self._holders = [0] * num_pages
        self._names: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}  # by name
        self._blank = deque(range(num_pages))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # named, without a holder

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def free_pages(self) -> int:
        """Those without a holder, named ones among them."""
        return len(self._blank) + len(self._evictable)

    @property
    def evictable_pages(self) -> int:
        """Those without a holder whose contents can still be found."""
        return len(self._evictable)

    @property
    def names(self) -> set[bytes]:
        """Of all contents that can be found."""
        return set(self._pages)

    def allocate(self, count: int) -> list[int] | None:
        """`count` free pages, each now with one holder; None, and nothing taken, when fewer are free."""
        if count > self.free_pages:
            return None
        pages = [self._blank.popleft() if self._blank else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def store(self, page: int, name: bytes) -> bool:
        """Names the contents of a page in use; False, and nothing done, if they can be found elsewhere."""
        self._require_in_use(page)
        if name in self._pages:
            return False
        if self._names[page] is not None:
            raise ValueError(f"page {page} has a name already")
        self._names[page], self._pages[name] = name, page
        return True

    def find(self, name: bytes) -> int | None:
        """The page with these contents, in use or not."""
        return self._pages.get(name)

    def in_use(self, page: int) -> bool:
        return self._holders[page] > 0

    def share(self, pages: Iterable[int]) -> None:
        """Adds a holder to each of these pages, which must be in use or named."""
        for page in pages:
            if not self._holders[page]:
                if self._names[page] is None:
                    self._require_in_use(page)
                del self._evictable[page]
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Takes a holder from each of these pages; a page that has none left is free."""
        for page in pages:
            self._require_in_use(page)
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._names[page] is None:
                self._blank.append(page)
            else:
                self._evictable[page] = None

    def clear(self) -> None:
        """Forgets all names; holders keep their pages. Tells nobody."""
        self._pages.clear()
        self._names = [None] * self.num_pages
        self._blank.extend(self._evictable)
        self._evictable.clear()

    def _evict(self) -> int:
        page, _ = self._evictable.popitem(last=False)
        name = self._names[page]
        assert name is not None
        self._names[page] = None
        del self._pages[name]
        self._on_evict(name)
        return page

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
        free = sorted([*self._blank, *self._evictable])
        assert free == unheld, f"pages {unheld} have no holder, but {free} are free"
        named = {name: page for page, name in enumerate(self._names) if name is not None}
        assert named == self._pages, f"pages are named {named}, but found as {self._pages}"
        blank = sorted(page for page in self._blank if self._names[page] is not None)
        assert not blank, f"pages {blank} have names and count as blank"
        nameless = [page for page in self._evictable if self._names[page] is None]
        assert not nameless, f"pages {nameless} have no names and count as evictable"
