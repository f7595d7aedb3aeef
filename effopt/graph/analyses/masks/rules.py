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
    return _opaque(node, target, *(r.operand(node, a, place) for a in arguments(node)))


def _opaque(node: Node, target: Any, *values: Any) -> Any:
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
    """What a tensor is if it is one number throughout."""
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
    return _opaque(node, _aten.mul.Tensor, a, b)


def _neg(r: Reads, node: Node, place: Place) -> Any:
    value = r.operand(node, arguments(node)[0], place)
    return held(node, value * -1) if isinstance(value, Sum) else _opaque(node, node.target, value)


def _abs(r: Reads, node: Node, place: Place) -> Any:
    value = r.operand(node, arguments(node)[0], place)
    return held(node, magnitude(value)) if isinstance(value, Sum) else _opaque(node, node.target, value)


def _floor_divide(r: Reads, node: Node, place: Place) -> Any:
    a, b = (r.operand(node, x, place) for x in arguments(node)[:2])
    mode = node.kwargs.get("rounding_mode", "floor")
    if val(node).dtype not in INTEGERS or mode not in ("floor", "trunc"):
        return _opaque(node, (node.target, mode), a, b)
    low = lowest(integer(a))
    if mode == "trunc" and (low is None or not statically_known_true(low >= 0)):
        raise Unread
    _compared(r, node, place)
    if integer(b).number is None or b.constant <= 0:
        raise Unread
    return quotient(a, b.constant)


def _compared(r: Reads, node: Node, place: Place) -> tuple[Sum, Sum]:
    """Both operands, in a dtype that holds either: a scalar is cast to that of the tensor, and may wrap."""
    a, b = (integer(r.operand(node, x, place)) for x in arguments(node)[:2])
    dtype = torch.result_type(*(val(x) for x in arguments(node)[:2]))
    for value in (a, b):
        _fits(value, dtype)
    return a, b


def _compare(build: Callable[[Sum, Sum], c.Condition]) -> Rule:
    def rule(r: Reads, node: Node, place: Place) -> Any:
        return build(*_compared(r, node, place))

    return rule


def _conditions(r: Reads, node: Node, place: Place) -> list[c.Condition]:
    operands = [a for a in arguments(node) if isinstance(a, Node)]
    if any(val(a).dtype != torch.bool for a in operands) or len(operands) != len(arguments(node)):
        raise Unread
    return [r.operand(node, a, place) for a in operands]


def _and(r: Reads, node: Node, place: Place) -> Any:
    return c.every(*_conditions(r, node, place))


def _or(r: Reads, node: Node, place: Place) -> Any:
    return c.some(*_conditions(r, node, place))


def _not(r: Reads, node: Node, place: Place) -> Any:
    return c.negated(*_conditions(r, node, place))


def _where(r: Reads, node: Node, place: Place) -> Any:
    chosen, yes, no = (r.operand(node, a, place) for a in arguments(node)[:3])
    return _choice(node, chosen, yes, no)


def _masked_fill(r: Reads, node: Node, place: Place) -> Any:
    no, chosen, yes = (r.operand(node, a, place) for a in arguments(node)[:3])
    return _choice(node, chosen, yes, no)


def _choice(node: Node, chosen: Any, yes: Any, no: Any) -> Any:
    if chosen in (c.TRUE, c.FALSE):
        return _typed(node, yes if chosen == c.TRUE else no)
    if val(node).dtype == torch.bool:
        yes, no = _typed(node, yes), _typed(node, no)
        return c.some(c.every(chosen, yes), c.every(c.negated(chosen), no))
    return _opaque(node, _aten.where.self, chosen, yes, no)


def _typed(node: Node, value: Any) -> Any:
    """A scalar operand as a value of the node's dtype."""
    if val(node).dtype == torch.bool and isinstance(value, (bool, Sum)):
        number = value if isinstance(value, bool) else value.number
        if number is None:
            raise Unread
        return c.TRUE if number else c.FALSE
    return value


def _triangle(r: Reads, node: Node, place: Place) -> Any:
    diagonal = scalar(arguments(node)[1] if len(arguments(node)) > 1 else node.kwargs.get("diagonal", 0))
    if diagonal is None:
        raise Unread
    ahead = place[-1] - place[-2] - diagonal
    inside = c.at_most(ahead) if node.target is _aten.tril.default else c.at_most(ahead * -1)
    zero: Any = c.FALSE if val(node).dtype == torch.bool else whole(0)
    return _choice(node, inside, r.operand(node, arguments(node)[0], place), zero)


def _copy(r: Reads, node: Node, place: Place) -> Any:
    """A change of dtype."""
    value, dtype = r.operand(node, arguments(node)[0], place), val(node).dtype
    before = val(arguments(node)[0]).dtype
    if dtype == before:
        return value
    if isinstance(value, Sum) and dtype == torch.bool:
        return c.negated(c.equal(value))
    if isinstance(value, Sum) and dtype in INTEGERS:
        return held(node, value)
    if dtype == torch.bool:
        raise Unread
    return _opaque(node, ("to", dtype), value)


def _both(*overloads: str) -> list[Any]:
    return [getattr(getattr(_aten, name.split(".")[0]), name.split(".")[1]) for name in overloads]


RULES: dict[Any, Rule] = {
    **dict.fromkeys(_both("arange.default", "arange.start", "arange.start_step"), _arange),
    **dict.fromkeys(_both("add.Tensor", "add.Scalar"), _add(1)),
    **dict.fromkeys(_both("sub.Tensor", "sub.Scalar"), _add(-1)),
    **dict.fromkeys(_both("rsub.Tensor", "rsub.Scalar"), _add(-1, turned=True)),
    **dict.fromkeys(_both("mul.Tensor", "mul.Scalar"), _mul),
    _aten.neg.default: _neg,
    _aten.abs.default: _abs,
    **dict.fromkeys(
        _both("floor_divide.default", "floor_divide.Scalar", "div.Tensor_mode", "div.Scalar_mode"),
        _floor_divide,
    ),
    **dict.fromkeys(_both("le.Tensor", "le.Scalar"), _compare(lambda a, b: c.at_most(a - b))),
    **dict.fromkeys(_both("lt.Tensor", "lt.Scalar"), _compare(lambda a, b: c.at_most(a - b + 1))),
    **dict.fromkeys(_both("ge.Tensor", "ge.Scalar"), _compare(lambda a, b: c.at_most(b - a))),
    **dict.fromkeys(_both("gt.Tensor", "gt.Scalar"), _compare(lambda a, b: c.at_most(b - a + 1))),
    **dict.fromkeys(_both("eq.Tensor", "eq.Scalar"), _compare(lambda a, b: c.equal(a - b))),
    **dict.fromkeys(_both("ne.Tensor", "ne.Scalar"), _compare(lambda a, b: c.negated(c.equal(a - b)))),
    **dict.fromkeys(_both("bitwise_and.Tensor", "logical_and.default", "__and__.Tensor"), _and),
    **dict.fromkeys(_both("bitwise_or.Tensor", "logical_or.default", "__or__.Tensor"), _or),
    **dict.fromkeys(_both("bitwise_not.default", "logical_not.default"), _not),
    **dict.fromkeys(_both("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"), _where),
    **dict.fromkeys(_both("masked_fill.Scalar", "masked_fill.Tensor"), _masked_fill),
    **dict.fromkeys(_both("tril.default", "triu.default"), _triangle),
    _aten._to_copy.default: _copy,
    _aten.to.dtype: _copy,
}
