"""The least number that a tensor may hold, where the graph says it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.masks.moves import MOVES
from effopt.graph.constants import constant_number
from effopt.graph.values import val

_aten = torch.ops.aten
WHERE = {_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar}
"""Calls that choose between their second and third operand."""
FILLS = {_aten.masked_fill.Scalar, _aten.masked_fill.Tensor}
"""Calls that choose between their first and third."""
_DEPTH = 12
_ANY = (-math.inf, math.inf)


def least_number(value: Any, coefficient: float = 1.0) -> float:
    """A number that `coefficient * value` never is below, but for rounding; -inf if the graph says none.

    Reads constants, and what `where` and `masked_fill` choose from, through views and casts. A NaN is below
    nothing.
    """
    low, high = (coefficient * x for x in _range(value, _DEPTH))
    return -math.inf if math.isnan(low) or math.isnan(high) else min(low, high)


def _range(value: Any, depth: int) -> tuple[float, float]:
    """The least and the greatest number."""
    number = constant_number(value)
    if number is not None:
        return _ANY if math.isnan(number) else (float(number), float(number))
    if not isinstance(value, Node) or depth == 0:
        return _ANY
    if isinstance(val(value), torch.Tensor) and val(value).dtype == torch.bool:
        return 0.0, 1.0
    args = value.args
    if value.target in WHERE:
        return _union(args[1], args[2], depth)
    if value.target in FILLS:
        return _union(args[0], args[2], depth)
    if value.target is _aten._to_copy.default:
        return _held(*_range(args[0], depth - 1), val(value).dtype)
    return _range(args[0], depth - 1) if value.target in MOVES else _ANY


def _union(one: Any, other: Any, depth: int) -> tuple[float, float]:
    lows, highs = zip(_range(one, depth - 1), _range(other, depth - 1), strict=True)
    return min(lows), max(highs)


def _held(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """What a cast makes of a range: a finite float32 can become -inf in a narrower type."""
    if dtype.is_complex:
        return _ANY
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if not dtype.is_floating_point and not (limits.min <= low and high <= limits.max):
        return _ANY
    return low if low >= limits.min else -math.inf, high if high <= limits.max else math.inf
