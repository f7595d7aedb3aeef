"""Where an element of a view, a slice or a broadcast comes from: the place in the operand that is read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.masks.sums import (
    Sum,
    Symbol,
    divided,
    highest,
    lowest,
    of,
    whole,
)
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
Place = tuple[Sum, ...]


def arguments(node: Node) -> tuple[Any, ...]:
    """Positional arguments of a call."""
    return node.args


def scalar(value: Any) -> Sum | None:
    """A whole number of the graph, perhaps symbolic; None for anything else."""
    if type(value) is int:
        return whole(value)
    held = val(value) if isinstance(value, Node) else None
    if type(held) is int:
        return whole(held)
    if not isinstance(held, torch.SymInt):
        return None
    expression = held.node.expr
    return whole(int(expression)) if expression.is_number else of(Symbol(str(expression), value))


def aligned(operand: Any, frame: Sequence[Any], place: Place) -> Place | None:
    """The place that broadcasting reads of `operand` for a place of a result with sizes `frame`."""
    sizes = shape_of(operand)
    tail = list(zip(sizes, frame[len(frame) - len(sizes) :], place[len(place) - len(sizes) :], strict=True))
    if all(statically_known_true(s == 1) or statically_known_true(s == f) for s, f, _ in tail):
        return tuple(whole(0) if statically_known_true(s == 1) else at for s, _, at in tail)
    return None


def source_of(node: Node, place: Place) -> tuple[Node, Place] | None:
    """The operand, and the place in it, that `node` reads for `place`; None if it is no such move."""
    if node.target is operator.getitem:
        return _unbound(node, place)
    move = MOVES.get(node.target)
    found = None if move is None else move(node, place)
    source = arguments(node)[0] if arguments(node) else None
    return None if found is None or not isinstance(source, Node) else (source, found)


def _unbound(node: Node, place: Place) -> tuple[Node, Place] | None:
    several, index = node.args
    if not isinstance(several, Node) or several.target is not _aten.unbind.int or type(index) is not int:
        return None
    source, dim = several.args[0], _argument(several, 1, "dim", 0)
    at = int(dim) % (len(place) + 1)
    return (source, (*place[:at], whole(index), *place[at:])) if isinstance(source, Node) else None


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return arguments(node)[position] if len(arguments(node)) > position else node.kwargs.get(name, default)


def _same(node: Node, place: Place) -> Place:
    return place


def _unsqueeze(node: Node, place: Place) -> Place:
    at = int(arguments(node)[1]) % len(place)
    return place[:at] + place[at + 1 :]


def _select(node: Node, place: Place) -> Place | None:
    sizes = shape_of(arguments(node)[0])
    dim = int(arguments(node)[1]) % len(sizes)
    at = scalar(arguments(node)[2])
    if at is None or (at.number is None and not _is_natural(at)):
        return None
    if at.number is not None and at.number < 0:
        if not isinstance(sizes[dim], int):
            return None
        at = whole(at.number + sizes[dim])
    return (*place[:dim], at, *place[dim:])


def _slice(node: Node, place: Place) -> Place | None:
    sizes = shape_of(arguments(node)[0])
    dim = int(_argument(node, 1, "dim", 0)) % len(sizes)
    start, step = _argument(node, 2, "start", None), _argument(node, 4, "step", 1)
    first = scalar(0 if start is None else start)
    if first is None or type(step) is not int or (first.number is None and not _is_natural(first)):
        return None
    if first.number is not None and first.number < 0:
        if not isinstance(sizes[dim], int):
            return None
        first = whole(max(0, first.number + sizes[dim]))
    return (*place[:dim], place[dim] * step + first, *place[dim + 1 :])


def _is_natural(s: Sum) -> bool:
    low = lowest(s)
    return low is not None and statically_known_true(low >= 0)


def _expand(node: Node, place: Place) -> Place | None:
    return aligned(arguments(node)[0], shape_of(node), place)


def _permute(node: Node, place: Place) -> Place:
    order = [int(d) % len(place) for d in arguments(node)[1]]
    return tuple(place[order.index(d)] for d in range(len(place)))


def _transpose(node: Node, place: Place) -> Place:
    moved = list(place)
    dims = (0, 1) if node.target is _aten.t.default else arguments(node)[1:3]
    if len(place) > 1:
        a, b = (int(d) % len(place) for d in dims)
        moved[a], moved[b] = moved[b], moved[a]
    return tuple(moved)


def _repeat(node: Node, place: Place) -> Place | None:
    sizes = shape_of(arguments(node)[0])
    found = []
    times = list(arguments(node)[1])[-len(sizes) :] if sizes else []
    for size, at, count in zip(sizes, place[len(place) - len(sizes) :], times, strict=True):
        inner = at if count == 1 else _remainder(at, size)
        if inner is None:
            return None
        found.append(inner)
    return tuple(found)


def _remainder(at: Sum, size: Any) -> Sum | None:
    """`at % size` where what is left after whole multiples is known to be below `size`."""
    if statically_known_true(size == 1):
        return whole(0)
    if not isinstance(size, int):
        return None
    inner = Sum(frozenset((a, by) for a, by in at.terms if by % size), at.constant % size)
    low, high = lowest(inner), highest(inner)
    if low is None or high is None:
        return None
    return inner if statically_known_true(low >= 0) and statically_known_true(high < size) else None


def _repeat_interleave(node: Node, place: Place) -> Place | None:
    times, dim = _argument(node, 1, "repeats", None), _argument(node, 2, "dim", None)
    if type(times) is not int or type(dim) is not int or times < 1:
        return None
    at = dim % len(place)
    return (*place[:at], divided(place[at], times), *place[at + 1 :])


def _reshape(node: Node, place: Place) -> Place | None:
    """Dimensions of length 1 come and go; neighbours may be merged into one, and one divided."""
    before, after = shape_of(arguments(node)[0]), shape_of(node)
    rest = [(size, at) for size, at in zip(after, place, strict=True) if not statically_known_true(size == 1)]
    sizes = [size for size in before if not statically_known_true(size == 1)]
    found: list[Sum] = []
    while sizes and rest:
        group = _regrouped(sizes, rest)
        if group is None:
            return None
        found += group
    if sizes or rest:
        return None
    return tuple(whole(0) if statically_known_true(size == 1) else found.pop(0) for size in before)


def _regrouped(sizes: list[Any], rest: list[tuple[Any, Sum]]) -> list[Sum] | None:
    """Indices into the fewest first `sizes` that as many elements as the first of `rest` have; takes both."""
    own = [sizes.pop(0)]
    total, (length, at) = own[0], rest.pop(0)
    while not statically_known_true(total == length):
        if sizes and statically_known_true(total < length):
            own.append(sizes.pop(0))
            total = total * own[-1]
        elif rest and isinstance(rest[0][0], int) and statically_known_true(length < total):
            inner, inner_at = rest.pop(0)
            length, at = length * inner, at * inner + inner_at
        else:
            return None
    found: list[Sum] = []
    for size in own[:0:-1]:
        if not isinstance(size, int) or size < 1:
            return None
        outer = divided(at, size)
        found.insert(0, at - outer * size)
        at = outer
    return [at, *found]


def _squeeze(node: Node, place: Place) -> Place | None:
    return _reshape(node, place)


MOVES: dict[Any, Callable[[Node, Place], Place | None]] = {
    _aten.clone.default: _same,
    _aten.contiguous.default: _same,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.lift_fresh_copy.default: _same,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.select.int: _select,
    _aten.slice.Tensor: _slice,
    _aten.expand.default: _expand,
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.t.default: _transpose,
    _aten.repeat.default: _repeat,
    _aten.repeat_interleave.self_int: _repeat_interleave,
    _aten.view.default: _reshape,
    _aten.reshape.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.squeeze.default: _squeeze,
    _aten.squeeze.dim: _squeeze,
    _aten.squeeze.dims: _squeeze,
}
