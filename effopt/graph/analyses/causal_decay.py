"""What multiplies the scores of a linear attention: a causal triangle, a decay, and factors of keys.

    weight = open(query, key) * factor(key)
             * exp(rate[head] * distance(query, key) + sum of gates behind the key, up to the query)

`weight_of` reads the graph of such a tensor, built by index arithmetic and cumulative sums, as that.
Conditions and indices are read by `analyses/masks`, sums of gates by `segment_sums`. What has no rule raises
`Reject` with the node at which the reading stopped. Looks only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.causal_distance import (
    CASTS,
    choice_at,
    condition_at,
    distance_at,
    origin_of,
    place_in,
    stop,
    triangle,
)
from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.evaluation import evaluate
from effopt.graph.analyses.masks.moves import MOVES, Place, aligned, source_of
from effopt.graph.analyses.masks.reading import Reader, covers
from effopt.graph.analyses.masks.sums import Sum
from effopt.graph.analyses.segment_sums import Span, narrower, span_of
from effopt.graph.constants import constant_number, scaled
from effopt.graph.rewrite import require
from effopt.graph.values import is_floating, val

_aten = torch.ops.aten
_TIMES = {_aten.mul.Tensor, _aten.mul.Scalar}
_MOST_STEPS = 64
"""Calls that a factor of keys is followed back through; behind more, a cumulative sum may be hidden."""
_POSITIVE = {_aten.exp.default, _aten.sigmoid.default}


@dataclass(frozen=True)
class Rate:
    """One factor `exp(by * rate * distance)`; the rate is an element of a tensor, or its logarithm, or 1."""

    distance: Sum
    by: float = 1.0
    node: Node | None = None
    """None: the rate is 1."""
    at: Place = ()
    is_base: bool = False
    """Whether the rate is the logarithm of the element."""
    within: c.Condition = c.TRUE
    """Where the factor is taken; elsewhere something else is selected, so that it may overflow there."""
    dtype: torch.dtype = torch.float32
    """The narrowest that holds it on its way to the scores."""


@dataclass(frozen=True)
class Gates:
    """One factor `exp(by * sum of gates)`."""

    span: Span
    by: float = 1.0
    within: c.Condition = c.TRUE
    """As that of a `Rate`."""
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Factor:
    """A tensor that no query changes, read at a place; it is no power, so that no decay is hidden in it."""

    node: Node
    at: Place
    dtype: torch.dtype


@dataclass(frozen=True)
class Weight:
    """1 where `open` holds, else 0, times all factors."""

    open: c.Condition = c.TRUE
    rates: tuple[Rate, ...] = ()
    gates: tuple[Gates, ...] = ()
    factors: tuple[Factor, ...] = ()

    def __mul__(self, other: Weight) -> Weight:
        both = (self.rates + other.rates, self.gates + other.gates, self.factors + other.factors)
        return Weight(c.every(self.open, other.open), *both)

    def where(self, condition: c.Condition) -> Weight:
        """Itself where a condition holds, and 0, by selection, elsewhere."""
        rates = tuple(replace(r, within=c.every(r.within, condition)) for r in self.rates)
        gates = tuple(replace(g, within=c.every(g.within, condition)) for g in self.gates)
        return replace(self, open=c.every(self.open, condition), rates=rates, gates=gates)

    def held_as(self, dtype: torch.dtype) -> Weight:
        """Itself in a tensor of a dtype."""
        kept = {
            name: tuple(replace(x, dtype=narrower(x.dtype, dtype)) for x in parts)
            for name, parts in (("rates", self.rates), ("gates", self.gates), ("factors", self.factors))
        }
        return replace(self, **kept)  # type: ignore[arg-type]


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a floating-point dtype has all numbers of another."""
    return dtype.is_floating_point and torch.promote_types(dtype, other) == dtype


def weight_of(node: Node, frame: tuple[Any, ...], place: Place, reader: Reader) -> Weight:
    """The factor that `node`, broadcast to `frame`, is at a place (.., query, key). Raises `Reject`."""
    at = aligned(node, frame, place)
    require(at is not None, f"{node.name} enlarges the scores", node)
    assert at is not None
    return weight_at(node, at, reader)


def condition_of(node: Node, frame: tuple[Any, ...], place: Place, reader: Reader) -> c.Condition:
    """The condition that a boolean `node` is likewise."""
    at = aligned(node, frame, place)
    require(at is not None and val(node).dtype == torch.bool, f"{node.name} is no mask of the scores", node)
    assert at is not None
    return condition_at(node, at, reader)


def weight_at(node: Node, place: Place, reader: Reader) -> Weight:
    """The factor that an element of `node` is. Raises `Reject` at what has no rule."""
    if not isinstance(val(node), torch.Tensor):
        raise stop(node)
    if val(node).dtype == torch.bool:
        return Weight(condition_at(node, place, reader))
    moved = source_of(node, place)
    if moved is not None:
        return weight_at(*moved, reader)
    number = constant_number(node)
    if number is not None and number in (0, 1):
        return Weight(c.TRUE if number else c.FALSE)
    if node.op != "call_function":
        return _factor(node, place)
    args: Any = node.args
    if node.target in CASTS and (val(args[0]).dtype == torch.bool or val(node).dtype.is_floating_point):
        return weight_at(args[0], place, reader).held_as(val(node).dtype)
    if node.target in (_aten.tril.default, _aten.triu.default):
        return weight_at(args[0], place, reader).where(triangle(node, place))
    if node.target in _TIMES and all(isinstance(a, Node) for a in args[:2]):
        one, other = (weight_at(a, place_in(node, a, place), reader) for a in args[:2])
        return one * other
    chosen = choice_at(node, place, reader)
    if chosen is not None:
        condition, yes, no = chosen
        if constant_number(no) != 0:
            raise stop(node)
        return _side(node, yes, place, reader).where(condition)
    if node.target is _aten.exp.default:
        found = _logarithm(args[0], place, 1.0, reader)
        rates = tuple(replace(r, dtype=val(node).dtype) for r in found.rates)
        return replace(found, rates=rates).held_as(val(node).dtype)
    if node.target in (_aten.pow.Tensor_Tensor, _aten.pow.Scalar):
        return _power(node, place, reader)
    return _factor(node, place)


def _factor(node: Node, place: Place) -> Weight:
    """A real tensor that hangs on the key and on no query, and holds no half of a decay."""
    axes = c.axes_of(place)
    if "key" not in axes or "query" in axes or not is_floating(node) or _accumulates(node):
        raise stop(node)
    return Weight(factors=(Factor(node, place, val(node).dtype),))


def _accumulates(node: Node) -> bool:
    """Whether a cumulative sum is among what a tensor is computed from, element by element."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        if current.target is _aten.cumsum.default or len(seen) > _MOST_STEPS:
            return True
        if current.target in MOVES or torch.Tag.pointwise in getattr(current.target, "tags", ()):
            waiting.extend(a for a in current.all_input_nodes if a not in seen)
            seen.update(current.all_input_nodes)
    return False


def _side(node: Node, value: Any, place: Place, reader: Reader) -> Weight:
    number = constant_number(value)
    if number is not None and number in (0, 1):
        return Weight(c.TRUE if number else c.FALSE)
    if not isinstance(value, Node):
        raise stop(node)
    return weight_at(value, place_in(node, value, place), reader)


def _power(node: Node, place: Place, reader: Reader) -> Weight:
    base, exponent = node.args[0], node.args[1]
    if not isinstance(exponent, Node):
        raise stop(node)
    distance = distance_at(exponent, place_in(node, exponent, place), reader)
    number = constant_number(base)
    if number is not None:
        require(number > 0, f"the base of the decay is {number}: its powers change sign or vanish", node)
        return Weight(rates=(Rate(distance, math.log(number), dtype=val(node).dtype),))
    assert isinstance(base, Node)
    at = place_in(node, base, place)
    source, at = origin_of(base, at)
    require(
        _is_positive(source),
        f"the base of the decay, {source.name}, is not known to be positive: take exp(rate * distance)",
        node,
    )
    return Weight(rates=(Rate(distance, 1.0, source, at, is_base=True, dtype=val(node).dtype),))


def _is_positive(node: Node) -> bool:
    if node.target in _POSITIVE:
        return True
    known = evaluate(node)
    return known is not None and bool((known > 0).all())


def _logarithm(node: Node, place: Place, by: float, reader: Reader) -> Weight:
    """The weight `exp(by * node)`."""
    moved = source_of(node, place)
    if moved is not None:
        return _logarithm(*moved, by, reader)
    found = span_of(node, place, reader)
    if found is not None:
        return Weight(gates=(Gates(found[0], by * found[1], dtype=found[0].dtype),))
    chosen = choice_at(node, place, reader)
    if chosen is not None:
        condition, yes, no = chosen
        fill = constant_number(no)
        if fill is None or by * fill != -math.inf or not isinstance(yes, Node):
            raise stop(node)
        return _logarithm(yes, place_in(node, yes, place), by, reader).where(condition)
    if (times := scaled(node)) is not None:
        return _logarithm(times[0], place_in(node, times[0], place), by * times[1], reader)
    if node.target in _TIMES:
        return _rated(node, place, by, reader)
    return Weight(rates=(Rate(distance_at(node, place, reader), by),))


def _rated(node: Node, place: Place, by: float, reader: Reader) -> Weight:
    """`exp(by * rate * distance)`: one operand depends on neither query nor key."""
    a, b = node.args[:2]
    for rate, distance in ((a, b), (b, a)):
        if not isinstance(rate, Node) or not isinstance(distance, Node):
            break
        source, at = origin_of(rate, place_in(node, rate, place))
        turned = 1.0
        while source.target is _aten.neg.default:
            turned = -turned
            source, at = origin_of(source.args[0], at)  # type: ignore[arg-type]
        if {"query", "key"} & c.axes_of(at):
            continue
        reason = f"the rate {source.name} holds whole numbers, which may wrap, or is a size"
        require(is_floating(source), reason, node)
        inner = _logarithm(distance, place_in(node, distance, place), 1.0, reader)
        alone = len(inner.rates) == 1 and inner.rates[0].node is None
        # What is hidden by -inf stays hidden by a positive rate alone, whose sign nobody knows.
        if alone and inner.open == c.TRUE:
            found = replace(inner.rates[0], node=source, at=at)
            return Weight(rates=(replace(found, by=found.by * by * turned),))
    raise stop(node)


def is_of_heads(node: Node, at: Place) -> bool:
    """Whether a tensor is read as one number a head: each dimension one index, or all heads in order."""
    return covers(node, at) and all(s.number is not None or getattr(s.only, "name", "") == "head" for s in at)
