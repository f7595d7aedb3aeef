"""Whether a node is the maximum of each row of scores, which may be subtracted before softmax."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.matching import bound_arguments
from effopt.graph.values import shape_of

_aten = torch.ops.aten
_PASSED = (_aten.detach.default, _aten._to_copy.default, _aten.unsqueeze.default)


def is_row_maximum(node: Any, of: Any) -> bool:
    """Whether `node` is the maximum of `of` over its last dimension: softmax does not see it subtracted."""
    kept = True
    while isinstance(node, Node) and node.target in _PASSED:
        if node.target is _aten.unsqueeze.default:
            if not kept or node.args[1] not in (-1, len(shape_of(node)) - 1):
                return False
            kept = False
        node = node.args[0]
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, Node) or node.target not in (_aten.max.dim, _aten.amax.default):
        return False
    arguments = bound_arguments(node)
    rank = len(shape_of(arguments["self"]))
    dims = arguments["dim"] if isinstance(arguments["dim"], (list, tuple)) else [arguments["dim"]]
    is_last = [int(d) % rank for d in dims] == [rank - 1]
    return arguments["self"] is of and bool(arguments["keepdim"]) == kept and is_last
