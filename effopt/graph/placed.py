"""Writes tensors of which it is known where their elements are read, laid out by axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import mask_sums
from effopt.graph.analyses.masks.sums import Axis, of
from effopt.graph.analyses.placed import Placed, axis_of
from effopt.graph.rewrite import Emit
from effopt.graph.values import shape_of

_aten = torch.ops.aten


def laid_out(emit: Emit, placed: Placed, axes: Sequence[str], sizes: Mapping[str, Any]) -> Node:
    """The tensor with just these axes, in full, as `require_plain` allows it to be read.

    Args:
        emit: takes the calls.
        placed: what is laid out.
        axes: the dimensions of the result, in order.
        sizes: of each axis.
    """
    if _is_laid_out(placed, axes, sizes):
        return placed.node
    node, plain = placed.node, list(placed.at)
    for dim in reversed(range(len(plain))):
        axis, repeats = axis_of(plain[dim])
        if axis is not None and repeats > 1:
            node = emit(_aten.repeat_interleave.self_int, node, repeats, dim)
            plain[dim] = of(axis)
    node = mask_sums.laid_out(emit, node, plain, axes)
    return expanded(emit, node, [sizes[name] for name in axes])


def _is_laid_out(placed: Placed, axes: Sequence[str], sizes: Mapping[str, Any]) -> bool:
    wanted = tuple(of(Axis(axis, sizes[axis])) for axis in axes)
    own = shape_of(placed.node)
    same = [statically_known_true(a == sizes[axis]) for a, axis in zip(own, axes, strict=False)]
    return placed.at == wanted and all(same)


def expanded(emit: Emit, node: Node, sizes: Sequence[Any]) -> Node:
    """A tensor broadcast to `sizes`, as a view; itself if it has them."""
    same = [statically_known_true(a == b) for a, b in zip(shape_of(node), sizes, strict=True)]
    if all(same):
        return node
    return emit(_aten.expand.default, node, [-1 if s else size for s, size in zip(same, sizes, strict=True)])
