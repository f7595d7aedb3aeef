"""Documents that are found by their positions: a new one starts where positions do not grow by 1.

    document = (positions.diff(prepend=...) != 1).cumsum(-1)

Between two places of one document every step is 1, so that their positions differ as their indices do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.masks.moves import Place, arguments
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.analyses.masks.sums import Axis, Element, Sum, of, whole
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
Run = tuple[Node, Place]
"""A tensor of positions, and the place in it but for the last dimension."""


def runs_of(query: Sum, key: Sum) -> list[Run]:
    """The positions by which documents, that number queries and keys, were found; empty if not so."""
    one, other = query.only, key.only
    if not (isinstance(one, Element) and isinstance(other, Element) and one.node is other.node):
        return []
    axes = [element.at[-1].only for element in (one, other)]
    if one.at[:-1] != other.at[:-1] or [a.name if isinstance(a, Axis) else "" for a in axes] != [
        "query",
        "key",
    ]:
        return []
    positions = _positions(one.node)
    found = None if positions is None else Reader().at(positions, other.at)
    place = found.only if isinstance(found, Sum) else None
    if not isinstance(place, Element) or place.at[-1] != other.at[-1]:
        return []
    return [(place.node, place.at[:-1])]


def _positions(documents: Node) -> Node | None:
    starts = _operand(documents, _aten.cumsum.default, 1)
    change = None if starts is None else arguments(starts)[0]
    if starts is None or starts.target is not _aten.ne.Scalar or arguments(starts)[1] != 1:
        return None
    if not isinstance(change, Node):
        return None
    positions = _operand(change, _aten.diff.default, 2)
    n, before, after = (
        arguments(change)[i] if len(arguments(change)) > i else d for i, d in ((1, 1), (3, None), (4, None))
    )
    one_before = isinstance(before, Node) and shape_of(before)[-1] == 1
    if positions is None or not one_before or n != 1 or after is not None:
        return None
    return positions if val(positions).dtype == torch.int64 else None


def _operand(node: Node, target: Any, dim_at: int) -> Node | None:
    """What a call of `target` along the last dimension, without keywords, is taken of."""
    if node.target is not target or node.kwargs or not isinstance(arguments(node)[0], Node):
        return None
    dim = arguments(node)[dim_at] if len(arguments(node)) > dim_at else -1
    rank = len(shape_of(node))
    return arguments(node)[0] if int(dim) % rank == rank - 1 else None


def distance_within(s: Sum, runs: set[Run]) -> Sum | None:
    """A sum of positions of one document, with indices in their place; None if it holds anything else.

    The same number more for all positions makes no difference only if as many are taken away as added.
    """
    total, balance = whole(s.constant), 0
    for atom, by in s.terms:
        if not (isinstance(atom, Element) and (atom.node, atom.at[:-1]) in runs):
            return None
        axis = atom.at[-1].only
        if not isinstance(axis, Axis) or axis.name not in ("query", "key"):
            return None
        total, balance = total + of(axis) * by, balance + by
    return total if balance == 0 else None
