import itertools

import pytest

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
    pages.check_integrity([(first, 0), (second, 0)])
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
        pages.check_integrity([(tables, end)])
        assert pages.used == len(tables.pages[0])


def test_the_integrity_check_finds_a_page_that_is_gone_too_early_or_kept_too_long():
    pages = RankPages([PageGroup(Span("window", 4), 8)], page_size=4)
    tables = PageTables(1)
    pages.extend(tables, 12)
    with pytest.raises(AssertionError):
        pages.check_integrity([(tables, 12)])
    pages.trim(tables, 12)
    pages.check_integrity([(tables, 12)])
    with pytest.raises(AssertionError):
        pages.check_integrity([(tables, 10)])
