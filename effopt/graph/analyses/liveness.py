"""How much memory the values of a graph take, in graph order.

A value lives from its node to its last reader, through views of it too. `reshape` and its like count
as views where their operand is contiguous. What a backend saves by fusing (values never written) or
reordering is not seen: this is the peak of running node by node.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from effopt.graph.normalize import is_view
from effopt.graph.ops.base import tensor_bytes
from effopt.graph.values import val

_COPIES_IF_STRIDED = frozenset({torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default})


@dataclass(frozen=True)
class Liveness:
    """The answer for one graph."""

    peak_bytes: float
    """Most bytes of intermediate values that are alive at once; inputs are not counted."""
    peak_node: str
    """The node at which that is so; empty for a graph without intermediate values."""
    input_bytes: float
    """Inputs: parameters, buffers and arguments. They live as long as the caller keeps them."""


def liveness(graph: Graph) -> Liveness:
    """Peak live bytes of `graph`, whose nodes carry `val`. Nothing is changed."""
    owner: dict[Node, Node] = {}
    last_use: dict[Node, int] = {}
    nodes = list(graph.nodes)
    for position, node in enumerate(nodes):
        base = _base(node)
        owner[node] = node if base is None else owner[base]
        last_use[owner[node]] = position
        for operand in node.all_input_nodes:
            last_use[owner[operand]] = position
    ends: dict[int, list[Node]] = {}
    for node, position in last_use.items():
        ends.setdefault(position, []).append(node)
    alive = peak = 0.0
    at = ""
    for position, node in enumerate(nodes):
        if node.op == "call_function" and owner[node] is node:
            alive += tensor_bytes(val(node))
            if alive > peak:
                peak, at = alive, node.name
        alive -= sum(tensor_bytes(val(n)) for n in ends.get(position, ()) if n.op == "call_function")
    inputs = sum(tensor_bytes(val(n)) for n in nodes if n.op in ("placeholder", "get_attr"))
    return Liveness(peak, at, inputs)


def _base(node: Node) -> Node | None:
    """The node whose storage this one shares, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    base = node.args[0]
    if node.target is operator.getitem:
        return base
    if not is_view(node):
        return None
    value = val(base)
    if node.target in _COPIES_IF_STRIDED and isinstance(value, torch.Tensor) and not value.is_contiguous():
        return None
    return base
