"""Which of several points no other point beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]


def front(points: Sequence[Point | None]) -> tuple[bool, ...]:
    """Whether each point is on the Pareto front: none is at least as low in both, and lower in one.

    Equal points are on the front together, or not at all. None, what was not measured, is not on it and
    beats nothing. Raises ValueError for NaN, which can be compared with nothing.
    """
    if any(math.isnan(value) for point in points if point is not None for value in point):
        raise ValueError("a point with NaN has no place on or behind a Pareto front")
    on_front: set[Point] = set()
    best: float | None = None
    for point in sorted({point for point in points if point is not None}):
        # Those before it are as low in the first: a point counts if it is lower than all in the second.
        if best is None or point[1] < best:
            on_front.add(point)
            best = point[1]
    return tuple(point in on_front for point in points)
