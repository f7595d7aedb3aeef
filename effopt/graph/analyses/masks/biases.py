"""What a bias is: keys that it hides by huge negative numbers, and what it adds besides.

bias = where(open, 0, -3.4e38) + slope[head] * (key - query) + table[bucket(key - query), head] + ...
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.forms import places
from effopt.graph.analyses.masks.moves import Place, aligned, source_of
from effopt.graph.analyses.masks.reading import Reader, covers
from effopt.graph.analyses.masks.sums import Axis, Element, Opaque, Sum, of
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
MASKED = -1e30
"""An added number at or below this hides a key: it is below any sum of float32 scores that a model makes."""
_ARITHMETIC: dict[Any, Callable[[float, float], float]] = {
    _aten.add.Tensor: operator.add,
    _aten.add.Scalar: operator.add,
    _aten.sub.Tensor: operator.sub,
    _aten.sub.Scalar: operator.sub,
    _aten.rsub.Scalar: lambda a, b: b - a,
    _aten.rsub.Tensor: lambda a, b: b - a,
    _aten.mul.Tensor: operator.mul,
    _aten.mul.Scalar: operator.mul,
}


@dataclass(frozen=True)
class Hidden:
    """0 where `open` holds, and `fill`, a masking number, elsewhere."""

    open: c.Condition
    fill: float


@dataclass(frozen=True)
class Added:
    """Any other term: an element of `node`."""

    node: Node
    at: Place
    kind: str
    """`alibi` | `relative table` | `per key` | `tensor`."""


@dataclass(frozen=True)
class Bias:
    """The sum of its terms."""

    hidden: tuple[Hidden, ...]
    added: tuple[Added, ...]

    @property
    def open(self) -> c.Condition:
        """Where no term hides the key."""
        return c.every(*(h.open for h in self.hidden))


def bias_of(bias: Node, reader: Reader | None = None) -> Bias:
    """The terms of a bias of 1 to 4 dimensions."""
    reader = reader or Reader()
    place = places(shape_of(bias))
    hidden, added = [], []
    for node, at in _terms(bias, place):
        value = reader.at(node, at)
        term = _hides(value, val(node).dtype)
        if term is not None:
            hidden.append(term)
        else:
            added.append(Added(node, at, kind_of(value)))
    return Bias(tuple(hidden), tuple(added))


def _terms(node: Node, place: Place) -> Iterator[tuple[Node, Place]]:
    """The nodes whose sum a node is, each the outermost one that can be laid out again."""
    inner, at = node, place
    while (moved := source_of(inner, at)) is not None:
        inner, at = moved
    plain = inner.target is _aten.add.Tensor and not inner.kwargs
    operands = [x for x in inner.args if isinstance(x, Node)] if plain else []
    found = [aligned(x, shape_of(inner), at) for x in operands]
    same = all(isinstance(val(x), torch.Tensor) and val(x).dtype == val(inner).dtype for x in operands)
    if len(operands) == 2 and same and all(p is not None for p in found):
        for x, p in zip(operands, found, strict=True):
            yield from _terms(x, p)  # type: ignore[arg-type]
    else:
        yield (node, place) if covers(node, place) else (inner, at)


def _hides(value: Any, dtype: torch.dtype) -> Hidden | None:
    pieces = _pieces(value)
    if pieces is None:
        return None
    cast = [(when, float(torch.tensor(x, dtype=torch.float64).to(dtype))) for when, x in pieces]
    fills = {x for _, x in cast if x != 0}
    if len(fills) != 1 or not max(fills) <= MASKED:
        return None
    return Hidden(c.some(*(when for when, x in cast if x == 0)), fills.pop())


def _pieces(value: Any) -> list[tuple[c.Condition, float]] | None:
    """The few numbers that a value can be, and when it is which; None if it can be others."""
    if isinstance(value, (int, float)) or (isinstance(value, Sum) and value.number is not None):
        return [(c.TRUE, float(value.number if isinstance(value, Sum) else value))]  # type: ignore[arg-type]
    if isinstance(value, (c.AtMost, c.Equal, c.Given, c.Not, c.All, c.Some)):
        return [(value, 1.0), (c.negated(value), 0.0)]
    value = value.only if isinstance(value, Sum) else value
    if not isinstance(value, Opaque):
        return None
    if value.target is _aten.where.self:
        when, yes, no = value.of
        found = [(when, _pieces(yes)), (c.negated(when), _pieces(no))]
        if any(pieces is None for _, pieces in found):
            return None
        return [(c.every(outer, inner), x) for outer, pieces in found for inner, x in pieces or ()]
    if value.is_cast:
        return _rounded(_pieces(value.of[0]), value.target[1])
    call = _ARITHMETIC.get(value.target)
    sides = [_pieces(x) for x in value.of] if call is not None and len(value.of) == 2 else [None]
    if call is None or any(side is None for side in sides) or min(len(s or ()) for s in sides) != 1:
        return None
    return [(c.every(p, q), call(x, y)) for p, x in sides[0] or () for q, y in sides[1] or ()]


def _rounded(pieces: Any, dtype: torch.dtype) -> list[tuple[c.Condition, float]] | None:
    if pieces is None or not dtype.is_floating_point:
        return None
    return [(when, float(torch.tensor(x, dtype=torch.float64).to(dtype))) for when, x in pieces]


def kind_of(value: Any) -> str:
    """What kind of bias a value is that hides nothing."""
    value = value.only if isinstance(value, Sum) else value
    if isinstance(value, Opaque) and value.is_cast:
        return kind_of(value.of[0])
    if isinstance(value, Opaque) and value.target is _aten.mul.Tensor:
        slopes, positions = sorted(value.of, key=lambda x: len(c.axes_of(x) & {"query", "key"}))
        of_heads = not c.axes_of(slopes) & {"query", "key"}
        return "alibi" if of_heads and _is_linear(positions) else "tensor"
    if isinstance(value, Element):
        moving = [s for s in value.at if c.axes_of(s) & {"query", "key"}]
        if len(moving) == 1 and "query" in c.axes_of(moving[0]) and _is_of_distance(moving[0]):
            return "relative table"
    return "tensor" if "query" in c.axes_of(value) else "per key"


def _is_linear(value: Any) -> bool:
    """Whether a value is a whole multiple of positions, plus a number."""
    if isinstance(value, Opaque) and value.is_cast:
        return _is_linear(value.of[0])
    return isinstance(value, Sum) and all(isinstance(a, Axis) or not c.axes_of(a) for a, _ in value.terms)


def _is_of_distance(value: Any) -> bool:
    """Whether a value is the same for any query and key that are as far apart."""
    # No length: a short axis would decide comparisons that the value leaves open.
    step, endless = of(Axis("step", 1 << 40)), 1 << 40
    further = {name: of(Axis(name, endless)) + step for name in ("query", "key")}
    return bool(c.replaced(value, further) == value)
