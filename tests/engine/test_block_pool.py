import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxmoe.engine.block_pool import BlockPool


class PoolUse(RuleBasedStateMachine):
    """Sequences that allocate, share and release pages in any order."""

    @initialize(num_pages=st.integers(1, 12))
    def create(self, num_pages):
        self.pool = BlockPool(num_pages)
        self.tables = []

    @rule(count=st.integers(0, 14))
    def allocate(self, count):
        free = self.pool.free_pages
        pages = self.pool.allocate(count)
        if count > free:
            assert pages is None
            assert self.pool.free_pages == free
        else:
            assert len(pages) == count
            assert not set(pages) & {page for table in self.tables for page in table}
            self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data):
        table = data.draw(st.sampled_from(self.tables))
        self.pool.share(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def every_page_is_accounted_for(self):
        self.pool.check_integrity(self.tables)
        used = {page for table in self.tables for page in table}
        assert self.pool.free_pages == self.pool.num_pages - len(used)


PoolUse.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
test_no_page_is_lost_or_handed_out_twice_whatever_the_use = PoolUse.TestCase


def test_the_page_free_for_longest_is_handed_out_first():
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([1, 0])
    assert pool.allocate(3) == [3, 1, 0]


def test_a_shared_page_is_free_only_when_its_last_holder_releases_it():
    pool = BlockPool(2)
    pages = pool.allocate(2)
    pool.share(pages)
    pool.release(pages)
    assert pool.free_pages == 0
    pool.release(pages)
    assert pool.free_pages == 2


def test_a_free_page_can_be_neither_released_nor_shared():
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.release([1])
    with pytest.raises(ValueError, match="page 0 is free"):
        pool.share([0])


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1], [1]], [[0, 0, 1]], [[0, 1, 2]]])
def test_the_integrity_check_finds_tables_that_do_not_match(tables):
    pool = BlockPool(3)
    pool.allocate(2)
    pool.check_integrity([[0, 1]])
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)


def test_named_contents_are_found_until_their_page_is_handed_out_anew():
    gone = []
    pool = BlockPool(3, gone.append)
    pages = pool.allocate(2)
    assert pool.store(0, b"a")
    assert pool.store(1, b"b")
    assert not pool.store(0, b"b")
    pool.release([1, 0])
    assert (pool.free_pages, pool.evictable_pages) == (3, 2)
    pool.share([1])
    assert pool.allocate(2) == [2, 0]
    assert gone == [b"a"]
    assert (pool.find(b"a"), pool.find(b"b")) == (None, 1)
    pool.check_integrity([[1], [2, 0]])
    pool.clear()
    pool.release(pages)
    assert (pool.find(b"b"), pool.free_pages, pool.evictable_pages) == (None, 2, 0)
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.share([1])
