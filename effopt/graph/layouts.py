"""The order in memory of a tensor's dimensions, and giving it to another tensor of the same shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.ops.base import hint
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import val

_aten = torch.ops.aten


def by_stride(value: Tensor) -> list[int]:
    """Its dimensions from the outermost inwards, whatever lies between them."""
    return sorted(range(value.dim()), key=lambda d: (-hint(value.stride()[d]), d))


def order_in_memory(value: Tensor) -> list[int] | None:
    """Its dimensions from the outermost inwards; None if elements overlap, or have gaps between them.

    Those of size 1 stand where their stride puts them, which says nothing.
    """
    order = by_stride(value)
    size = 1
    for dim in reversed(order):
        if statically_known_true(value.shape[dim] == 1):
            continue
        if not statically_known_true(value.stride(dim) == size):
            return None
        size = size * value.shape[dim]
    return order


def require_dense(node: Node) -> None:
    """Raise `Reject` where `laid_out_as` could not follow."""
    strides = list(val(node).stride())
    words = f"{node.name} has strides {strides}: elements that overlap or leave gaps are not written"
    require(order_in_memory(val(node)) is not None, words, node)


def laid_out_as(emit: Emit, node: Node, old: Node) -> Node:
    """`node` with the strides of `old`, a tensor of its shape, but for gaps that `old` has."""
    order, own = by_stride(val(old)), order_in_memory(val(node))
    wide = {dim for dim, size in enumerate(val(node).shape) if not statically_known_true(size == 1)}
    if own is not None and [d for d in own if d in wide] == [d for d in order if d in wide]:
        return node
    back = [order.index(dim) for dim in range(len(order))]
    inner = emit(_aten.contiguous.default, emit(_aten.permute.default, node, order))
    return emit(_aten.permute.default, inner, back)
