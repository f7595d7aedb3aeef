"""The least number that a tensor may hold, where the graph says it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.constants import constant_number
from effopt.graph.values import val

_aten = torch.ops.aten
_MOVES = {
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.clone.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.lift_fresh_copy.default,
}
_CHOICES = {_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar}


def least_number(value: Any, coefficient: float = 1.0) -> float:
    """A number that `coefficient * value` never is below; -inf if the graph does not say one.

    Reads constants, and what `where` and `masked_fill` choose from, through views and casts to a float type
    that holds the numbers. A NaN is below nothing.
    """
    low, high = _range(value)
    bounds = [coefficient * x for x in (low, high) if x is not None]
    return min(bounds) if len(bounds) == 2 and not any(map(math.isnan, bounds)) else -math.inf


def _range(value: Any) -> tuple[float | None, float | None]:
    while isinstance(value, Node) and value.op == "call_function":
        number = constant_number(value)
        if number is not None:
            return float(number), float(number)
        if value.target in _CHOICES:
            return _union(*value.args[1:3])
        if value.target is _aten.masked_fill.Scalar:
            return _union(value.args[0], value.args[2])
        if value.target is _aten._to_copy.default:
            return _rounded(value)
        if value.target not in _MOVES:
            return None, None
        value = value.args[0]
    number = constant_number(value)
    return (None, None) if number is None else (float(number), float(number))


def _union(*values: Any) -> tuple[float | None, float | None]:
    ranges = [_range(value) for value in values]
    lows, highs = zip(*ranges, strict=True)
    if None in lows or None in highs:
        return None, None
    return min(lows), max(highs)


def _rounded(cast: Node) -> tuple[float | None, float | None]:
    low, high = _range(cast.args[0])
    dtype = val(cast).dtype
    if low is None or high is None or not dtype.is_floating_point:
        return None, None
    limit = torch.finfo(dtype).max
    return (low, high) if -limit <= low and high <= limit else (None, None)
