"""What a node computes of its operands, op by op: the rules that `reading.py` reads by.

A rule gives the value of one element of a node, or raises `Unread`: then the element stands for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.moves import Place, arguments, scalar
from effopt.graph.analyses.masks.sums import (
    Element,
    Opaque,
    Sum,
    highest,
    lowest,
    magnitude,
    of,
    quotient,
    whole,
)
from effopt.graph.constants import constant_number
from effopt.graph.values import val

_aten = torch.ops.aten
_CASTS = {_aten._to_copy.default, _aten.to.dtype}
INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


class Unread(Exception):  # noqa: N818 - a value that travels by `raise`
    """No rule: the element stands for itself."""


class Reads(Protocol):
    """What a rule asks of the reader."""

    def at(self, node: Node, place: Place) -> Any: ...
    def operand(self, node: Node, operand: Any, place: Place) -> Any: ...


Rule = Callable[[Reads, Node, Place], Any]


def pointwise(r: Reads, node: Node, place: Place) -> Any:
    """A function of what is at the same place, about which nothing more is read."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        raise Unread
    if val(node).dtype == torch.bool or not isinstance(val(node), torch.Tensor) or node.kwargs:
        raise Unread
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise Unread
    return opaque(node, target, *(r.operand(node, a, place) for a in arguments(node)))


def opaque(node: Node, target: Any, *values: Any) -> Any:
    try:
        hash(values)
    except TypeError:
        raise Unread from None
    found = Opaque(target, values)
    return of(found) if val(node).dtype in INTEGERS else found


def itself(node: Node, place: Place) -> Any:
    dtype = val(node).dtype
    if dtype == torch.bool:
        return c.Given(node, place)
    return of(Element(node, place)) if dtype in INTEGERS else Element(node, place)


def number_of(node: Node) -> Any:
    """What a tensor is that is made of one number throughout. Casts have a rule: they may change it."""
    if node.target in _CASTS:
        return None
    number, dtype = constant_number(node), val(node).dtype
    if number is None:
        return None
    if dtype == torch.bool:
        return c.TRUE if number else c.FALSE
    if dtype not in INTEGERS:
        return float(number)
    fits = number == int(number) and torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max
    return whole(int(number)) if fits else None


def integer(value: Any) -> Sum:
    if not isinstance(value, Sum):
        raise Unread
    return value


def held(node: Node, value: Sum) -> Sum:
    """A sum that the node's dtype holds without wrapping."""
    _fits(value, val(node).dtype)
    return value


def _fits(value: Sum, dtype: torch.dtype) -> None:
    """Raise unless a dtype is known to hold the sum without wrapping."""
    if dtype not in INTEGERS:
        raise Unread
    if dtype == torch.int64:
        return
    low, high, info = lowest(value), highest(value), torch.iinfo(dtype)
    if low is None or high is None:
        raise Unread
    if not (statically_known_true(low >= info.min) and statically_known_true(high <= info.max)):
        raise Unread


def _arange(r: Reads, node: Node, place: Place) -> Any:
    if val(node).dtype not in INTEGERS:
        raise Unread
    starts = node.target is not _aten.arange.default
    first = scalar(arguments(node)[0] if starts else 0)
    step = arguments(node)[2] if node.target is _aten.arange.start_step and len(arguments(node)) > 2 else 1
    if first is None or type(step) is not int:
        raise Unread
    return held(node, first + place[0] * step)


def _add(sign: int, turned: bool = False) -> Rule:
    def rule(r: Reads, node: Node, place: Place) -> Any:
        alpha = node.kwargs.get("alpha", arguments(node)[2] if len(arguments(node)) > 2 else 1)
        if val(node).dtype not in INTEGERS or type(alpha) is not int:
            return pointwise(r, node, place)
        a, b = (integer(r.operand(node, x, place)) for x in arguments(node)[:2])
        a, b = (b, a) if turned else (a, b)
        return held(node, a + b * sign if alpha == 1 else _scaled(a, b, sign * alpha, turned))

    return rule


def _scaled(a: Sum, b: Sum, by: int, turned: bool) -> Sum:
    if turned:
        raise Unread
    return a + b * by


def _mul(r: Reads, node: Node, place: Place) -> Any:
    a, b = (r.operand(node, x, place) for x in arguments(node)[:2])
    if val(node).dtype == torch.bool:
        return _and(r, node, place)
    if val(node).dtype in INTEGERS and isinstance(a, Sum) and isinstance(b, Sum):
        by = b.number if b.number is not None else a.number
        if by is not None:
            return held(node, (a if b.number is not None else b) * by)
    return opaque(node, _aten.mul.Tensor, a, b)


def _neg(r: Reads, node: Node, place: Place) -> Any:
    value = r.operand(node, arguments(node)[0], place)
    return held(node, value * -1) if isinstance(value, Sum) else opaque(node, node.target, value)


def _abs(r: Reads, node: Node, place: Place) -> Any:
    value = r.operand(node, arguments(node)[0], place)
    return held(node, magnitude(value)) if isinstance(value, Sum) else opaque(node, node.target, value)


def _floor_divide(r: Reads, node: Node, place: Place) -> Any:
    a, b = (r.operand(node, x, place) for x in arguments(node)[:2])
    mode = node.kwargs.get("rounding_mode", "floor")
    if val(node).dtype not in INTEGERS or mode not in ("floor", "trunc"):
        return opaque(node, (node.target, mode), a, b)
    low = lowest(integer(a))
    if mode == "trunc" and (low is None or not statically_known_true(low >= 0)):
        raise Unread
    _compared(r, node, place)
    if integer(b).number is None or b.constant <= 0:
        raise Unread
    return quotient(a, b.constant)


def _remainder(r: Reads, node: Node, place: Place) -> Any:
    """`a % b` has the sign of b: `a - b * (a // b)`."""
    a, b = (r.operand(node, x, place) for x in arguments(node)[:2])
    if val(node).dtype not in INTEGERS:
        return opaque(node, node.target, a, b)
    a, b = _compared(r, node, place)
    if b.number is None or b.constant <= 0:
        return opaque(node, node.target, a, b)
    return a - quotient(a, b.constant) * b.constant


def _compared(r: Reads, node: Node, place: Place) -> tuple[Sum, Sum]:
    """Both operands, in a dtype that holds either: a scalar is cast to that of the tensor, and may wrap."""
    a, b = (integer(r.operand(node, x, place)) for x in arguments(node)[:2])
    one, other = (x if isinstance(x, torch.Tensor) else 0 for x in map(val, arguments(node)[:2]))
    dtype = torch.result_type(one, other)
    for value in (a, b):
        _fits(value, dtype)
    return a, b


def _compare(build: Callable[[Sum, Sum], c.Condition]) -> Rule:
    def rule(r: Reads, node: Node, place: Place) -> Any:
        return build(*_compared(r, node, place))

    return rule


def truths(r: Reads, node: Node, place: Place) -> list[c.Condition]:
    operands = [a for a in arguments(node) if isinstance(a, Node)]
    if any(val(a).dtype != torch.bool for a in operands) or len(operands) != len(arguments(node)):
        raise Unread
    return [r.operand(node, a, place) for a in operands]


def _and(r: Reads, node: Node, place: Place) -> Any:
    return c.every(*truths(r, node, place))


def both(*overloads: str) -> list[Any]:
    return [getattr(getattr(_aten, name.split(".")[0]), name.split(".")[1]) for name in overloads]


RULES: dict[Any, Rule] = {
    **dict.fromkeys(both("arange.default", "arange.start", "arange.start_step"), _arange),
    **dict.fromkeys(both("add.Tensor", "add.Scalar"), _add(1)),
    **dict.fromkeys(both("sub.Tensor", "sub.Scalar"), _add(-1)),
    **dict.fromkeys(both("rsub.Tensor", "rsub.Scalar"), _add(-1, turned=True)),
    **dict.fromkeys(both("mul.Tensor", "mul.Scalar"), _mul),
    _aten.neg.default: _neg,
    _aten.abs.default: _abs,
    **dict.fromkeys(
        both("floor_divide.default", "floor_divide.Scalar", "div.Tensor_mode", "div.Scalar_mode"),
        _floor_divide,
    ),
    **dict.fromkeys(both("remainder.Scalar", "remainder.Tensor"), _remainder),
    **dict.fromkeys(both("le.Tensor", "le.Scalar"), _compare(lambda a, b: c.at_most(a - b))),
    **dict.fromkeys(both("lt.Tensor", "lt.Scalar"), _compare(lambda a, b: c.at_most(a - b + 1))),
    **dict.fromkeys(both("ge.Tensor", "ge.Scalar"), _compare(lambda a, b: c.at_most(b - a))),
    **dict.fromkeys(both("gt.Tensor", "gt.Scalar"), _compare(lambda a, b: c.at_most(b - a + 1))),
    **dict.fromkeys(both("eq.Tensor", "eq.Scalar"), _compare(lambda a, b: c.equal(a - b))),
    **dict.fromkeys(both("ne.Tensor", "ne.Scalar"), _compare(lambda a, b: c.negated(c.equal(a - b)))),
    **dict.fromkeys(both("bitwise_and.Tensor", "logical_and.default", "__and__.Tensor"), _and),
}
