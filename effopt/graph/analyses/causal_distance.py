"""Distances between query and key, and comparisons of them, whatever dtype holds the indices.

`analyses/masks` reads whole numbers; models also take their indices as floating-point numbers, because a rate
multiplies them. Looks only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.least_number import FILLS, WHERE
from effopt.graph.analyses.masks.moves import Place, aligned, scalar, source_of
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.analyses.masks.sums import Axis, Magnitude, Sum, of, whole
from effopt.graph.constants import constant_number
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten
CASTS = {_aten._to_copy.default, _aten.to.dtype, _aten.type_as.default}
_CLAMPS = {_aten.clamp.default, _aten.clamp_min.default, _aten.relu.default}
_EXACT = (torch.float32, torch.float64)
"""Dtypes that hold the indices of any mask that fits into memory."""


def stop(node: Node) -> Reject:
    """What is raised where the reading ends."""
    if node.target is _aten.cumsum.default:
        words = f"the decay is made of {node.name}, a cumulative sum that is not read at two tokens"
        return Reject(f"{words}: take exp(sum[query] - sum[key]), or a segment sum", node)
    what = "an input" if node.op != "call_function" else str(node.target).removesuffix(".default")
    return Reject(f"the scores are multiplied by {node.name} ({what}), which is not known to be causal", node)


def place_in(node: Node, operand: Any, place: Place) -> Place:
    """The place that broadcasting reads of an operand. Raises `Reject`."""
    at = aligned(operand, shape_of(node), place)
    if at is None:
        raise stop(node)
    return at


def origin_of(node: Node, at: Place) -> tuple[Node, Place]:
    """What views read."""
    while (moved := source_of(node, at)) is not None:
        node, at = moved
    return node, at


def condition_at(node: Node, place: Place, reader: Reader) -> c.Condition:
    """A condition as masks are read, and comparisons of distances that floating-point numbers hold."""
    moved = source_of(node, place)
    if moved is not None:
        return condition_at(*moved, reader)
    operands = [a for a in node.args if isinstance(a, Node)]
    if node.target in _NOT and val(operands[0]).dtype == torch.bool:
        return c.negated(condition_at(operands[0], place, reader))
    if node.target not in _COMPARISONS or not any(map(is_floating, operands)):
        found: c.Condition = reader.at(node, place)
        return found
    sides = [_of(node, a, place, reader) for a in node.args]
    # A magnitude may stand for a clamp, which it equals under causality alone.
    if any(isinstance(atom, Magnitude) for side in sides for atom, _ in side.terms):
        raise stop(node)
    return _COMPARISONS[node.target](*sides)


def triangle(node: Node, place: Place) -> c.Condition:
    """Where `tril` or `triu` keeps its operand."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
    diagonal = scalar(given)
    require(diagonal is not None, "the diagonal is not known when compiling", node)
    ahead = place[-1] - place[-2] - (diagonal or whole(0))
    return c.at_most(ahead if node.target is _aten.tril.default else ahead * -1)


def choice_at(node: Node, place: Place, reader: Reader) -> tuple[c.Condition, Any, Any] | None:
    """(condition, where it holds, elsewhere) of a selection; a fill is turned, so that the number is last."""
    args: Any = node.args
    if node.target in WHERE:
        condition, yes, no = args[:3]
    elif node.target in FILLS:
        no, condition, yes = args[:3]
    else:
        return None
    held = condition_at(condition, place_in(node, condition, place), reader)
    if constant_number(no) is None or constant_number(yes) == 0 or constant_number(yes) == -math.inf:
        return c.negated(held), no, yes
    return held, yes, no


def distance_at(node: Node, place: Place, reader: Reader) -> Sum:
    """A whole number as a sum over the axes, whatever dtype holds it. Raises `Reject`."""
    if not isinstance(val(node), torch.Tensor):
        size = scalar(node)
        if size is None:
            raise stop(node)
        return size
    dtype = val(node).dtype
    moved = source_of(node, place)
    if moved is not None:
        return distance_at(*moved, reader)
    if node.target in _CLAMPS:
        return _clamp(node, place, reader)
    if dtype != torch.bool and not dtype.is_floating_point:
        found = reader.at(node, place)
        if isinstance(found, Sum):
            return found
        raise stop(node)
    if dtype not in _EXACT or node.op != "call_function":
        raise stop(node)
    number = constant_number(node)
    if number is not None and math.isfinite(number) and number == int(number):
        return whole(int(number))
    rule = _DISTANCES.get(node.target)
    if rule is None:
        raise stop(node)
    return rule(node, place, reader)


def _of(node: Node, operand: Any, place: Place, reader: Reader) -> Sum:
    if isinstance(operand, Node):
        return distance_at(operand, place_in(node, operand, place), reader)
    number = constant_number(operand)
    if number is None or not math.isfinite(number) or number != int(number):
        raise stop(node)
    return whole(int(number))


def _sum(sign: int) -> Callable[[Node, Place, Reader], Sum]:
    def rule(node: Node, place: Place, reader: Reader) -> Sum:
        if node.kwargs or len(node.args) > 2:
            raise stop(node)
        a, b = (_of(node, x, place, reader) for x in node.args)
        return a + b * sign

    return rule


def _arange(node: Node, place: Place, reader: Reader) -> Sum:
    starts = node.target is not _aten.arange.default
    first = scalar(node.args[0]) if starts else whole(0)
    if first is None or node.target is _aten.arange.start_step:
        raise stop(node)
    return place[0] + first


def _clamp(node: Node, place: Place, reader: Reader) -> Sum:
    """`max(query - key, 0)`, said as the magnitude: equal under causality, and neither is below 0."""
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", 0)
    inner = _of(node, node.args[0], place, reader)
    if low != 0 or len(node.args) > 2 or "max" in node.kwargs or steps_back(inner) != 1:
        raise stop(node)
    return of(Magnitude(inner))


_DISTANCES: dict[Any, Callable[[Node, Place, Reader], Sum]] = {
    **dict.fromkeys(CASTS, lambda node, place, reader: _of(node, node.args[0], place, reader)),
    **dict.fromkeys((_aten.sub.Tensor, _aten.sub.Scalar), _sum(-1)),
    **dict.fromkeys((_aten.add.Tensor, _aten.add.Scalar), _sum(1)),
    **dict.fromkeys((_aten.arange.default, _aten.arange.start, _aten.arange.start_step), _arange),
    _aten.neg.default: lambda node, place, reader: _of(node, node.args[0], place, reader) * -1,
    _aten.abs.default: lambda node, place, reader: of(Magnitude(_of(node, node.args[0], place, reader))),
}


def steps_back(distance: Sum) -> int | None:
    """n, if a sum is `n * (query - key)`; for its magnitude, which is the same under causality, n above 0."""
    only = distance.only
    if isinstance(only, Magnitude):
        inner = steps_back(only.of)
        return None if inner is None else abs(inner)
    found = {a.name: by for a, by in distance.terms if isinstance(a, Axis)}
    n = found.get("query", 0)
    is_multiple = len(distance.terms) == 2 and not distance.constant and found == {"query": n, "key": -n}
    return n if is_multiple else None


def _both(name: str) -> tuple[Any, Any]:
    packet = getattr(_aten, name)
    return packet.Tensor, packet.Scalar


_NOT = {_aten.bitwise_not.default, _aten.logical_not.default}
_COMPARISONS: dict[Any, Callable[[Sum, Sum], c.Condition]] = {
    **dict.fromkeys(_both("le"), lambda a, b: c.at_most(a - b)),
    **dict.fromkeys(_both("lt"), lambda a, b: c.at_most(a - b + 1)),
    **dict.fromkeys(_both("ge"), lambda a, b: c.at_most(b - a)),
    **dict.fromkeys(_both("gt"), lambda a, b: c.at_most(b - a + 1)),
}
