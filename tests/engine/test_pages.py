import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.pages import PageGroup, PageTables, RankPages, pages_reached
from jaxmoe.spans import FULL, Span

SPANS = [Span("window", 1), Span("window", 5), Span("window", 8), Span("chunk", 1), Span("chunk", 6), Span("chunk", 16)]


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
def test_pages_reached_are_those_of_the_worst_placed_queries(span, page_size):
    for tokens in (1, 2, 7, 16):
        needed = [
            (start + tokens - 1) // page_size - span.first(start) // page_size + 1
            for start in range(span.size * page_size * 2)
        ]
        assert pages_reached(span, tokens, page_size, 1000) == max(needed)


def test_no_more_pages_are_reached_than_there_are():
    assert pages_reached(FULL, 1, 4, 7) == 7
    assert pages_reached(Span("window", 100), 1, 4, 7) == 7


def test_a_sequence_gets_pages_in_every_group_or_in_none():
    pages = RankPages([PageGroup(FULL, 4), PageGroup(Span("window", 4), 2)], page_size=4)
    first, second = PageTables(2), PageTables(2)
    assert pages.extend(first, 5)
    assert pages.used == 4
    assert not pages.extend(second, 1)
    pages.check_integrity([(first, 0, 0), (second, 0, 0)])
    assert pages.used == 4
    pages.release(first)
    assert pages.used == 0
    assert pages.total == 6


@pytest.mark.parametrize("span", [*SPANS, FULL], ids=str)
def test_trimming_takes_what_is_out_of_sight_and_keeps_the_rest_in_its_place(span):
    pages = RankPages([PageGroup(span, 30)], page_size=4)
    tables = PageTables(1)
    page_of = {}
    for start, end in itertools.pairwise([0, 3, 4, 5, 6, 12, 13, 31, 48, 49]):
        assert pages.extend(tables, end)
        page_of.update(enumerate(tables.pages[0], start=tables.passed[0]))
        named = dict(enumerate(tables.pages[0], start=tables.passed[0]))
        seen = range(span.first(start) // 4, -(-end // 4))
        assert named == {index: page_of[index] for index in seen}
        pages.trim(tables, end)
        pages.check_integrity([(tables, end, end)])
        assert pages.used == len(tables.pages[0])


def test_the_integrity_check_finds_a_page_that_is_gone_too_early_or_kept_too_long():
    pages = RankPages([PageGroup(Span("window", 4), 8)], page_size=4)
    tables = PageTables(1)
    pages.extend(tables, 12)
    with pytest.raises(AssertionError):
        pages.check_integrity([(tables, 12, 12)])
    pages.trim(tables, 12)
    pages.check_integrity([(tables, 12, 12)])
    with pytest.raises(AssertionError):
        pages.check_integrity([(tables, 10, 10)])


@given(
    spans=st.lists(st.sampled_from([FULL, *SPANS]), min_size=1, max_size=3, unique=True),
    page_size=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_a_hit_is_the_longest_prefix_of_which_all_is_here_that_later_queries_see(spans, page_size, data):
    names = [bytes([index]) for index in range(data.draw(st.integers(1, 12)))]
    pages = RankPages([PageGroup(span, 100) for span in spans], page_size)
    here = [data.draw(st.sets(st.integers(0, len(names) - 1), min_size=len(names) // 2)) for _ in spans]
    for group, indices in enumerate(here):
        for index in indices:
            (page,) = pages._pools[group].allocate(1)
            pages._pools[group].store(page, names[index])

    def is_hit(count):
        return all(
            set(range(span.first(count * page_size) // page_size, count)) <= indices
            for span, indices in zip(spans, here, strict=True)
        )

    most = data.draw(st.integers(0, len(names)))
    count = pages.hit(names, most)
    assert count == max(filter(is_hit, range(most + 1)))
    tables = PageTables(len(spans))
    pages.adopt(tables, names, count)
    for group, span in enumerate(spans):
        assert tables.passed[group] == span.first(count * page_size) // page_size
        assert tables.passed[group] + len(tables.pages[group]) == tables.end == count
        assert all(
            pages._pools[group].find(names[index]) == page
            for index, page in enumerate(tables.pages[group], tables.passed[group])
        )
