"""Whether a node is the maximum of each row of scores, which may be subtracted before softmax."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.matching import bound_arguments
from effopt.graph.values import shape_of

_aten = torch.ops.aten


def is_row_maximum(node: Any, of: Any) -> bool:
    """Whether `node` is the maximum of `of` over its last dimension: softmax does not see it subtracted."""
    while isinstance(node, Node) and node.target in (_aten.detach.default, _aten._to_copy.default):
        node = node.args[0]
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, Node) or node.target not in (_aten.max.dim, _aten.amax.default):
        return False
    arguments = bound_arguments(node)
    rank = len(shape_of(arguments["self"]))
    dims = arguments["dim"] if isinstance(arguments["dim"], (list, tuple)) else [arguments["dim"]]
    return (
        arguments["self"] is of and bool(arguments["keepdim"]) and [int(d) % rank for d in dims] == [rank - 1]
    )
