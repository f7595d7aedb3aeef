"""Where values that were computed one by one become one tensor.

    stack([y_0, y_1, y_2], dim);   cat([y_0, ..], dim);   o[:, 0] = y_0, o[:, 1] = y_1, ..

Writes to parts are functional here: a chain of `select_scatter` or `slice_scatter`. It collects if every
place along one axis is written once; what was there before is then nowhere to be seen. Looks only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.dataflow import calls_of
from effopt.graph.matching import bound_arguments
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
JOINS = (_aten.stack.default, _aten.cat.default)
"""Calls that join values."""
WRITES = (_aten.select_scatter.default, _aten.slice_scatter.default)
"""Calls that write one into a tensor."""
_FURTHEST = 64  # calls between a value and what collects it; those of known models are at most five
_DEAD_DEPTH = 3  # what capture leaves behind of a write to a part, and nothing reads, is two calls deep


@dataclass(frozen=True)
class Collected:
    """One tensor of values, one for each position of an axis."""

    node: Node
    values: tuple[Node, ...]
    """By position along the axis."""
    axis: int
    keeps_axis: bool
    """Whether each value has that axis already, with size 1."""
    nodes: tuple[Node, ...]
    """The calls that collect, `node` last."""


def is_alive(node: Node, depth: int = _DEAD_DEPTH) -> bool:
    """Whether anything comes of a call. True where that would take long to tell."""
    if node.op == "output" or not depth or node.is_impure():
        return True
    return any(is_alive(user, depth - 1) for user in node.users)


def collects(graph: Graph) -> bool:
    """Whether a graph may hold a collection: to be asked ahead of a search for loops."""
    return any(node.target in WRITES or _joins_places(node) for node in calls_of(graph, (*JOINS, *WRITES)))


def collectors(value: Node, beyond: Collection[Any]) -> dict[Node, Node]:
    """Each call that collects what is made of `value` -> which of the collected values that is.

    `beyond` are calls that are not looked behind.
    """
    found: dict[Node, Node] = {}
    seen = set(beyond)
    waiting = [(value, user) for user in value.users]
    while waiting and len(seen) < _FURTHEST + len(beyond):
        operand, user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target in JOINS:
            found.setdefault(user, operand)
        elif user.target in WRITES:
            if operand is user.args[1]:
                found.setdefault(_last_write(user), operand)
        else:
            waiting.extend((user, further) for further in user.users)
    return found


def _last_write(node: Node) -> Node:
    while True:
        after = [user for user in node.users if is_alive(user)]
        if len(after) != 1 or not _continues(after[0], node):
            return node
        node = after[0]


def _continues(write: Node, before: Any) -> bool:
    """Whether `write` goes on where `before` wrote, along the same axis."""
    is_next = isinstance(before, Node) and write.target == before.target and write.args[0] is before
    return is_next and _place(write)[0] == _place(before)[0]


def _place(write: Node) -> tuple[int, Any]:
    """Axis and position of a write of one place; None if it is of more."""
    _, value, axis, position, *_ = bound_arguments(write).values()
    axis, size = axis % val(write).dim(), val(write).shape[axis]
    if write.target is _aten.slice_scatter.default:
        position = (position or 0) if shape_of(value)[axis] == 1 else None
    if type(position) is int and type(size) is int and position < 0:
        position += size
    return axis, position


def _joins_places(node: Node) -> bool:
    """Whether each value that is joined is one place of the axis."""
    values, axis = bound_arguments(node).values()
    axis = axis % val(node).dim()
    return node.target is _aten.stack.default or all(
        len(shape_of(value)) > axis and statically_known_true(shape_of(value)[axis] == 1) for value in values
    )


def collected(node: Node) -> Collected:
    """What the last call of a collection collects. Raises `Reject`."""
    if node.target in JOINS:
        values, axis = bound_arguments(node).values()
        keeps_axis, axis = node.target is _aten.cat.default, axis % val(node).dim()
        require(_joins_places(node), f"{node.name} joins values that are more than one place long", node)
        return Collected(node, tuple(values), axis, keeps_axis, (node,))
    writes = [node]
    while _continues(writes[-1], writes[-1].args[0]):
        writes.append(writes[-1].args[0])  # type: ignore[arg-type]
    axis, size = _place(node)[0], shape_of(node)[_place(node)[0]]
    by_place = {_place(write)[1]: write for write in writes}
    is_whole = type(size) is int and len(writes) == size and set(by_place) == set(range(size))
    require(is_whole, f"{len(by_place)} of {size} places along axis {axis} are written, each once", node)
    values = tuple(by_place[place].args[1] for place in range(size))
    keeps_axis = node.target is _aten.slice_scatter.default
    return Collected(node, values, axis, keeps_axis, tuple(writes[::-1]))
