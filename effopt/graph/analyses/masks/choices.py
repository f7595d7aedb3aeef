"""Choices, triangles and changes of dtype: the rules of conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.moves import Place, arguments, scalar
from effopt.graph.analyses.masks.rules import INTEGERS, Reads, Rule, Unread, both, held, opaque, truths
from effopt.graph.analyses.masks.rules import RULES as COMPARISONS
from effopt.graph.analyses.masks.sums import Opaque, Sum, whole
from effopt.graph.values import val

_aten = torch.ops.aten


def _or(r: Reads, node: Node, place: Place) -> Any:
    return c.some(*truths(r, node, place))


def _not(r: Reads, node: Node, place: Place) -> Any:
    return c.negated(*truths(r, node, place))


def _where(r: Reads, node: Node, place: Place) -> Any:
    chosen, yes, no = (r.operand(node, a, place) for a in arguments(node)[:3])
    return _choice(node, chosen, yes, no)


def _masked_fill(r: Reads, node: Node, place: Place) -> Any:
    no, chosen, yes = (r.operand(node, a, place) for a in arguments(node)[:3])
    return _choice(node, chosen, yes, no)


def _choice(node: Node, chosen: Any, yes: Any, no: Any) -> Any:
    if not isinstance(chosen, (c.AtMost, c.Equal, c.Given, c.Not, c.All, c.Some)):
        raise Unread
    if chosen in (c.TRUE, c.FALSE):
        return _typed(node, yes if chosen == c.TRUE else no)
    if val(node).dtype == torch.bool:
        yes, no = _typed(node, yes), _typed(node, no)
        return c.some(c.every(chosen, yes), c.every(c.negated(chosen), no))
    return opaque(node, _aten.where.self, chosen, yes, no)


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
    is_zero = _is_number(value, 0.0, before) if dtype == torch.bool else None
    return _cast(node, value, dtype) if is_zero is None else c.negated(is_zero)


def _cast(node: Node, value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, float):
        number = torch.tensor(value, dtype=torch.float64).to(dtype).item()
        if dtype == torch.bool:
            return c.TRUE if number else c.FALSE
        if dtype in INTEGERS and number != value:
            raise Unread
        return whole(int(number)) if dtype in INTEGERS else float(number)
    if isinstance(value, Sum) and dtype == torch.bool:
        return c.negated(c.equal(value))
    if isinstance(value, Sum) and dtype in INTEGERS:
        return held(node, value)
    if dtype == torch.bool:
        raise Unread
    return opaque(node, ("to", dtype), value)


def _equals(otherwise: Rule, is_contrary: bool) -> Rule:
    """`chosen == number`, of a choice between two numbers or a condition that was made a number."""

    def rule(r: Reads, node: Node, place: Place) -> Any:
        operand, number = arguments(node)[0], scalar(arguments(node)[1])
        if number is None or number.number is None or not isinstance(operand, Node):
            return otherwise(r, node, place)
        found = _is_number(r.operand(node, operand, place), float(number.number), val(operand).dtype)
        if found is None:
            return otherwise(r, node, place)
        return c.negated(found) if is_contrary else found

    return rule


def _is_number(value: Any, number: float, dtype: torch.dtype) -> c.Condition | None:
    value = value.only if isinstance(value, Sum) else value
    if isinstance(value, Opaque) and value.target is _aten.where.self:
        when, *sides = value.of
    else:
        is_cast = isinstance(value, Opaque) and value.is_cast
        when, sides = value.of[0] if is_cast else value, [1.0, 0.0]
    if not isinstance(when, (c.AtMost, c.Equal, c.Given, c.Not, c.All, c.Some)):
        return None
    numbers = [x.number if isinstance(x, Sum) else x for x in sides]
    if not all(isinstance(x, (int, float)) for x in numbers):
        return None
    # Of whole numbers that wrap, the comparison may see others.
    if dtype in INTEGERS and not all(_fits(x, dtype) for x in (*numbers, number)):
        return None
    # As the comparison has them: in the dtype of the tensor, where 0.1 is another number.
    held_as = torch.float64 if dtype == torch.bool else dtype
    yes, no = (_held(x, held_as) == _held(number, held_as) for x in numbers)
    return c.some(
        c.every(when, c.TRUE if yes else c.FALSE), c.every(c.negated(when), c.TRUE if no else c.FALSE)
    )


def _fits(number: Any, dtype: torch.dtype) -> bool:
    return bool(number == int(number)) and torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max


def _held(number: Any, dtype: torch.dtype) -> Any:
    return torch.tensor(number, dtype=torch.float64).to(dtype).item()


RULES: dict[Any, Rule] = {
    **dict.fromkeys(both("bitwise_or.Tensor", "logical_or.default", "__or__.Tensor"), _or),
    **dict.fromkeys(both("bitwise_not.default", "logical_not.default"), _not),
    **dict.fromkeys(both("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"), _where),
    **dict.fromkeys(both("masked_fill.Scalar", "masked_fill.Tensor"), _masked_fill),
    **dict.fromkeys(both("tril.default", "triu.default"), _triangle),
    **dict.fromkeys(both("eq.Scalar", "eq.Tensor"), _equals(COMPARISONS[_aten.eq.Tensor], False)),
    **dict.fromkeys(both("ne.Scalar", "ne.Tensor"), _equals(COMPARISONS[_aten.ne.Tensor], True)),
    _aten._to_copy.default: _copy,
    _aten.to.dtype: _copy,
}
