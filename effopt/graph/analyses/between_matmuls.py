"""Whether a node stands before a matmul, or between two, as the softmax of attention does. Looks only."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.normalize import is_view

_aten = torch.ops.aten
_MATMULS = (_aten.matmul.default, _aten.bmm.default, _aten.baddbmm.default, _aten.einsum.default)
_SEEN_THROUGH = (
    *(
        getitem,
        _aten.dropout.default,
        _aten.native_dropout.default,
        _aten.clone.default,
        _aten._to_copy.default,
    ),
    *(_aten.cat.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.contiguous.default),
    *(_aten.masked_fill.Scalar, _aten.masked_fill.Tensor, _aten.max.dim, _aten.amax.default),
    *(_aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar),
    *(_aten.pad.default, _aten.constant_pad_nd.default, _aten.type_as.default),
    *(_aten.flip.default, _aten.roll.default),
)
_FURTHEST = 64
"""Nodes looked at on each side; the longest of Inductor's patterns has about 20 in between."""


def is_between_matmuls(node: Node) -> bool:
    """Whether matmuls lead to `node` and follow it, with only pointwise ops, views and casts in between."""
    return feeds_matmul(node) and _reaches_matmul(node, lambda n: n.all_input_nodes)


def feeds_matmul(node: Node) -> bool:
    """Whether a matmul follows `node`, with only pointwise ops, views and casts in between."""
    return _reaches_matmul(node, lambda n: list(n.users))


def _reaches_matmul(start: Node, neighbours: Any) -> bool:
    """Whether a matmul lies within reach of `start`, itself included."""
    seen: set[Node] = set()
    waiting = [start]
    while waiting and len(seen) < _FURTHEST:
        node = waiting.pop(0)
        if node in seen or node.op != "call_function":
            continue
        if node.target in _MATMULS:
            return True
        seen.add(node)
        if node is start or _is_seen_through(node):
            waiting.extend(neighbours(node))
    return False


def _is_seen_through(node: Node) -> bool:
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise or is_view(node) or node.target in _SEEN_THROUGH
