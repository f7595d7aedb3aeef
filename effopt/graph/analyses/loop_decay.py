"""What a loop multiplies its state by, as a sum of logarithms.

    exp(g) -> g,   1 / exp(g) -> -g,   sigmoid(x) -> log_sigmoid(x),   1 - sigmoid(x) -> log_sigmoid(-x)
    0.9 -> log(0.9)

A factor is taken if it is known not to be negative: as an exponential, a sigmoid, or a constant in (0, 1].
Looks only.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.factors import call_of
from effopt.graph.analyses.masks.evaluation import evaluate
from effopt.graph.analyses.over_time import Timed, number_of, operands_of
from effopt.graph.constants import constant_number
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import val

_aten = torch.ops.aten
_WANTED = "take exp of a logarithm, sigmoid, or a constant in (0, 1]"


class Kind(enum.Enum):
    """How the logarithm of a factor follows from what is held of it."""

    NUMBER = enum.auto()
    EXPONENT = enum.auto()
    SIGMOID = enum.auto()
    REST_OF_SIGMOID = enum.auto()
    CONSTANT = enum.auto()


@dataclass(frozen=True)
class Factor:
    """`by` times a logarithm."""

    kind: Kind
    of: Timed
    by: float = 1.0


def decay_of(found: Timed, where: Node, by: float = 1.0) -> Iterator[Factor]:
    """The factors of a decay. Raises `Reject` at one that is not known to be in (0, 1], or an exponential."""
    number = number_of(found)
    if number is not None:
        yield _of_number(float(number), by, where)
        return
    call = call_of(found.value)
    target, args = call if call is not None else (None, [])
    if target in (_aten.mul.Tensor, _aten.mul.Scalar):
        for operand in args[:2]:
            yield from decay_of(operands_of(found, operand), where, by)
    elif target is _aten.div.Tensor and (number := constant_number(args[1])):
        yield from decay_of(operands_of(found, args[0]), where, by)
        yield _of_number(1 / number, by, where)
    elif target is _aten.exp.default:
        yield Factor(Kind.EXPONENT, operands_of(found, args[0]), by)
    elif target is _aten.reciprocal.default and (inner := _exponent(found, args[0])) is not None:
        yield Factor(Kind.EXPONENT, inner, -by)
    elif target is _aten.sigmoid.default:
        yield Factor(Kind.SIGMOID, operands_of(found, args[0]), by)
    elif target is _aten.pow.Tensor_Scalar:
        power = constant_number(args[1])
        words = f"its decay is raised to {args[1]}, which is not a number above 0"
        require(power is not None and 0 < power < math.inf, words, where)
        yield from decay_of(operands_of(found, args[0]), where, by * float(power or 1.0))
    elif (whole := _rest_of_rest(found, target, args)) is not None:
        yield from decay_of(whole, where, by)
    else:
        yield _last(found, target, args, by, where)


def _exponent(found: Timed, operand: Any) -> Timed | None:
    """What an operand is the exponential of."""
    inner = operands_of(found, operand)
    call = call_of(inner.value)
    return operands_of(inner, call[1][0]) if call is not None and call[0] is _aten.exp.default else None


def _rest_of_rest(found: Timed, target: Any, args: list[Any]) -> Timed | None:
    """What `found` is, if that is `1 - (1 - x)`, as `lerp` by `1 - x` has it."""
    rest = _one_less(target, args)
    inner = None if rest is None else operands_of(found, rest)
    call = None if inner is None else call_of(inner.value)
    whole = None if call is None else _one_less(*call)
    return None if whole is None or inner is None else operands_of(inner, whole)


def _of_number(number: float, by: float, where: Node) -> Factor:
    require(number > 0, f"its decay is {number}: it has no logarithm", where)
    require(number <= 1, f"its decay is {number}: it grows", where)
    return Factor(Kind.NUMBER, Timed(number, ()), by)


def _last(found: Timed, target: Any, args: list[Any], by: float, where: Node) -> Factor:
    """One that is no product."""
    if target is _aten._to_copy.default:
        value = found.value if isinstance(found.value, Node) else found.value.nodes[0]
        raise Reject(f"its decay is rounded to {val(value).dtype}", where)
    rest = _one_less(target, args)
    inner = None if rest is None else operands_of(found, rest)
    call = None if inner is None else call_of(inner.value)
    if inner is not None and call is not None and call[0] is _aten.sigmoid.default:
        return Factor(Kind.REST_OF_SIGMOID, operands_of(inner, call[1][0]), by)
    known = evaluate(found.value) if isinstance(found.value, Node) else None
    if known is not None:
        is_decay = bool(((known > 0) & (known <= 1)).all())
        require(is_decay, f"its decay, {found}, holds numbers that are not in (0, 1]", where)
        return Factor(Kind.CONSTANT, found, by)
    raise Reject(f"its decay, {found}, is not known to be in (0, 1]: {_WANTED}", where)


def _one_less(target: Any, args: list[Any]) -> Any:
    """What is taken from 1 in `1 - x`."""
    if target is _aten.rsub.Scalar:
        x, number, alpha = args
    elif target in (_aten.sub.Tensor, _aten.rsub.Tensor):
        (number, x) = args[:2] if target is _aten.sub.Tensor else args[1::-1]
        alpha = args[2]
    else:
        return None
    return x if constant_number(number) == 1 and alpha == 1 else None
