"""Whether a node stands before a matmul, or between two, as the softmax of attention does. Looks only."""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.heads import equal
from effopt.graph.normalize import is_view
from effopt.graph.values import is_floating, shape_of

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
    *(_aten.flip.default, _aten.roll.default, _aten.tril.default, _aten.triu.default),
)
_FURTHEST = 64
"""Nodes looked at on each side; the longest of Inductor's patterns has about 20 in between."""


def is_between_matmuls(node: Node) -> bool:
    """Whether matmuls lead to `node` and follow it, with only pointwise ops, views and casts in between."""
    return feeds_matmul(node) and follows_matmul(node)


def follows_matmul(node: Node) -> bool:
    """Whether a matmul leads to `node`, with only pointwise ops, views and casts in between."""
    return _reaches_matmul(node, lambda n: n.all_input_nodes)


def feeds_matmul(node: Node) -> bool:
    """Whether a matmul follows `node`, with only pointwise ops, views and casts in between."""
    return _reaches_matmul(node, lambda n: list(n.users))


def without_product(softmax: Node | None) -> str:
    """Why the scores of a softmax are no product, if they come from outside of the graph; else nothing."""
    if softmax is None:
        return ""
    above = list(_reach(softmax, lambda node: node.all_input_nodes))
    below = list(_reach(softmax, lambda node: list(node.users)))
    given = [node for node in above if node.op == "placeholder" and _is_as_large(node, softmax)]
    products = [node for node in below if node.target in _MATMULS]
    values = {x for node in products for x in node.all_input_nodes} - set(below)
    # A softmax of features reads products of keys and values, as linear attention does.
    if not given or any(node.target in _MATMULS for node in above) or any(map(follows_matmul, values)):
        return ""
    return (
        f"the scores are {given[0].name}, an input of this graph, and query @ key^T is not in it: if a graph"
        " break lies between, TORCH_LOGS=graph_breaks tells its line and what to change; where that calls"
        " `item()`, torch._dynamo.config.capture_scalar_outputs = True keeps the graph whole"
    )


def _is_as_large(node: Node, softmax: Any) -> bool:
    """Whether a tensor can be scores, and not just a bias of some rows or keys."""
    return is_floating(node) and len(shape_of(node)) > 2 and equal(shape_of(node), shape_of(softmax))


def _reaches_matmul(start: Node, neighbours: Any) -> bool:
    """Whether a matmul lies within reach of `start`, itself included."""
    return any(node.target in _MATMULS for node in _reach(start, neighbours))


def _reach(start: Node, neighbours: Any) -> Iterator[Node]:
    """`start`, and what follows it with only pointwise ops, views and casts in between."""
    seen: set[Node] = set()
    waiting = [start]
    while waiting and len(seen) < _FURTHEST:
        node = waiting.pop(0)
        if node not in seen:
            seen.add(node)
            yield node
            if node is start or (node.op == "call_function" and is_seen_through(node)):
                waiting.extend(neighbours(node))


def is_seen_through(node: Node) -> bool:
    """Whether a call is pointwise, or lays its operand out."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return pointwise or is_view(node) or node.target in _SEEN_THROUGH
