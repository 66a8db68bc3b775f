from jaxmoe.engine.kv_events import KvEvent, RankEvents, hash64
from jaxmoe.engine.pages import PageGroup, PageTables, RankPages, page_name
from jaxmoe.spans import FULL, Span


def names_of(*pages):
    names, parent = [], b""
    for page in pages:
        parent = page_name(parent, page)
        names.append(parent)
    return names


def test_a_page_is_named_by_its_tokens_and_all_before_them():
    a, b = names_of([1, 2], [3, 4])
    assert names_of([1, 2], [3, 4]) == [a, b]
    assert names_of([3, 4])[0] not in (a, b)
    assert names_of([5, 2], [3, 4])[1] != b
    assert -(2**63) <= hash64(a) < 2**63


def test_events_tell_pages_with_their_tokens_and_what_comes_before_them():
    events = RankEvents()
    a, b, c = names_of([1, 2], [3, 4], [5, 6])
    events.stored(b"", [a, b], [1, 2, 3, 4])
    events.stored(b, [c], [5, 6])
    events.removed(c)
    events.removed(b)
    assert events.take() == (
        KvEvent("stored", (hash64(a), hash64(b)), None, (1, 2, 3, 4)),
        KvEvent("stored", (hash64(c),), hash64(b), (5, 6)),
        KvEvent("removed", (hash64(c), hash64(b))),
    )
    assert events.take() == ()
    events.cleared()
    assert events.take() == (KvEvent("cleared"),)


def test_events_that_nobody_took_in_time_are_told_as_the_state_that_they_led_to():
    events = RankEvents(most=2)
    a, b, c = names_of([1], [2], [3])
    (other,) = names_of([9])
    events.stored(b"", [a], [1])
    events.stored(a, [b], [2])
    events.stored(b"", [other], [9])
    events.removed(a)
    events.stored(b, [c], [3])
    events.stored(b"", [a], [1])
    assert events.take() == (
        KvEvent("cleared"),
        KvEvent("stored", (hash64(a), hash64(b)), None, (1, 2)),
        KvEvent("stored", (hash64(other),), None, (9,)),
        KvEvent("stored", (hash64(c),), hash64(b), (3,)),
    )
    events.removed(c)
    assert events.take() == (KvEvent("removed", (hash64(c),)),)


def test_of_several_groups_the_one_that_sees_furthest_is_told_of():
    events = RankEvents()
    pages = RankPages([PageGroup(Span("window", 2), 9), PageGroup(FULL, 3)], 2, events)
    tables, names = PageTables(2), names_of([1, 2], [3, 4])
    pages.extend(tables, 6)
    pages.store(tables, names, 0, b"", [1, 2, 3, 4])
    pages.release(tables)
    assert [event.hashes for event in events.take()] == [tuple(map(hash64, names))]
    pages.extend(PageTables(2), 4)
    assert events.take() == (KvEvent("removed", (hash64(names[1]),)),)
