"""The Pareto front against its definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effopt.tradeoff.pareto import Point, front

FEW = st.sampled_from([-0.0, 0.0, 1.0, 2.0, 3.0, math.inf])
"""Few values, so that ties in one coordinate and equal points are common."""
POINTS = st.lists(st.none() | st.tuples(FEW | st.floats(allow_nan=False), FEW | st.floats(allow_nan=False)))


def beats(one: Point, other: Point) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@given(POINTS)
def test_front_is_what_nothing_beats(points: list[Point | None]) -> None:
    measured = [p for p in points if p is not None]
    expected = tuple(p is not None and not any(beats(q, p) for q in measured) for p in points)
    assert front(points) == expected


@given(POINTS.filter(any))
def test_something_is_always_on_the_front(points: list[Point | None]) -> None:
    assert any(front(points))


def test_equal_points_share_their_place() -> None:
    assert front([(1.0, 2.0), (2.0, 1.0), (1.0, 2.0), (2.0, 2.0), None]) == (True, True, True, False, False)
    assert front([]) == ()


def test_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        front([(1.0, math.nan), (0.0, 0.0)])
