"""What a node picks, or sums up, along a dimension: the rules of indexing, differences and running sums."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.moves import Place, aligned, arguments
from effopt.graph.analyses.masks.rules import INTEGERS, Reads, Rule, Unread, held, integer
from effopt.graph.analyses.masks.sums import Axis, Sum, lowest, of, whole
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten


def _at(place: Place, dim: int, at: Sum) -> Place:
    return (*place[:dim], at, *place[dim + 1 :])


def _index(r: Reads, node: Node, place: Place) -> Any:
    source, indices = arguments(node)
    given = [i for i, x in enumerate(indices) if x is not None]
    tensors = [indices[i] for i in given]
    # Bytes select as truth values do.
    if any(val(x).dtype not in INTEGERS - {torch.uint8} for x in tensors):
        raise Unread
    rank = max(len(shape_of(x)) for x in tensors)
    start = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    frame, own = shape_of(node)[start : start + rank], place[start : start + rank]
    rest = list(place[:start] + place[start + rank :])
    inner: list[Sum] = []
    for i in range(len(shape_of(source))):
        if i not in given:
            inner.append(rest.pop(0))
            continue
        at = aligned(indices[i], frame, own)
        index = None if at is None else integer(r.at(indices[i], at))
        low = None if index is None else lowest(index)
        # Below 0 an index counts from the end.
        if index is None or low is None or not statically_known_true(low >= 0):
            raise Unread
        inner.append(index)
    return r.at(source, tuple(inner))


def _embedding(r: Reads, node: Node, place: Place) -> Any:
    table, indices = arguments(node)[:2]
    index = r.at(indices, place[:-1])
    return r.at(table, (integer(index), place[-1]))


def _index_select(r: Reads, node: Node, place: Place) -> Any:
    source, dim, indices = arguments(node)[:3]
    at = int(dim) % len(place)
    index = integer(r.at(indices, (place[at],)))
    return r.at(source, (*place[:at], index, *place[at + 1 :]))


def _diff(r: Reads, node: Node, place: Place) -> Any:
    """Of what grows by the same number at each step, from one such step before it."""
    given = arguments(node)
    source, n, dim, before, after = given + (None, 1, -1, None, None)[len(given) :]
    if n != 1 or after is not None or node.kwargs or not isinstance(before, Node):
        raise Unread
    d = int(dim) % len(place)
    if not statically_known_true(shape_of(before)[d] == 1):
        raise Unread
    step = integer(r.at(source, place)) - integer(r.at(source, _at(place, d, place[d] - 1)))
    first = integer(r.at(source, _at(place, d, whole(0)))) - integer(r.at(before, _at(place, d, whole(0))))
    if step.number is None or step != first:
        raise Unread
    return step


def _cumsum(r: Reads, node: Node, place: Place) -> Any:
    """Of what is the same number all along."""
    source, dim = arguments(node)[:2]
    d = int(dim) % len(place)
    along = of(Axis(f"{node.name} summed", shape_of(source)[d]))
    value = r.at(source, _at(place, d, along))
    if value in (c.TRUE, c.FALSE):
        value = whole(value == c.TRUE)
    number = integer(value).number
    if number is None:
        raise Unread
    return held(node, place[d] * number + number)


RULES: dict[Any, Rule] = {
    _aten.index.Tensor: _index,
    _aten.embedding.default: _embedding,
    _aten.index_select.default: _index_select,
    _aten.diff.default: _diff,
    _aten.cumsum.default: _cumsum,
}
