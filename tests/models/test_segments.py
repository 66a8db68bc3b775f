import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.models.segments import Segment, segments


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("A" * 32, [Segment(0, 1, 32)]),
        ("AAA" + "B" * 58, [Segment(0, 1, 3), Segment(3, 1, 58)]),
        ("ABAC" * 12, [Segment(0, 4, 12)]),
        ("ABABABC", [Segment(0, 2, 3), Segment(6, 1, 1)]),
        ("ABC", [Segment(0, 1, 1), Segment(1, 1, 1), Segment(2, 1, 1)]),
        ("", []),
    ],
)
def test_layers_that_repeat_are_found(kinds, expected):
    assert segments(kinds) == expected


@given(st.text("AB", max_size=30))
def test_segments_cover_all_layers_in_order_and_repeat_what_they_say(kinds):
    covered = ""
    for segment in segments(kinds):
        assert segment.start == len(covered)
        covered += kinds[segment.start : segment.start + segment.period] * segment.repeats
    assert covered == kinds
