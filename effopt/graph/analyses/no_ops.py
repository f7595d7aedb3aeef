"""Which operand a call gives back unchanged: its values, shape, dtype, device and strides.

Exact, except that `x + 0` gives zero for minus zero. Symbolic sizes are compared without guards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.constants import constant_number
from effopt.graph.ops.base import bind_schema
from effopt.graph.values import val

_aten = torch.ops.aten
COPIES = (_aten.clone.default, _aten.contiguous.default, _aten.alias.default)
"""Calls that give back equal values, perhaps with other strides, and the same gradients."""
_NARROW_IN_WIDE = {
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}


def stands_for(node: Node) -> Node | None:
    """The node whose value `node` has, or None if it computes something."""
    source_of = _STANDS_FOR.get(node.target) if node.op == "call_function" else None
    source = source_of(node) if source_of is not None else None
    return source if isinstance(source, Node) and _is_same(val(node), val(source)) else None


def _is_same(new: Any, old: Any) -> bool:
    """Shape, dtype, device and strides: whoever reads one can read the other."""
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
        return False
    pairs = [*zip(new.shape, old.shape, strict=False), *zip(new.stride(), old.stride(), strict=False)]
    is_alike = new.dtype == old.dtype and new.device == old.device and new.dim() == old.dim()
    return is_alike and all(statically_known_true(a == b) for a, b in pairs)


def _times_one(node: Node) -> Any:
    bound = list(bind_schema(node.target, node.args, node.kwargs).values())  # type: ignore[arg-type]
    for kept, other in ((bound[0], bound[1]), (bound[1], bound[0])):
        if constant_number(other) == 1:
            return kept
    return None


def _plus_zero(node: Node) -> Any:
    bound = list(bind_schema(node.target, node.args, node.kwargs).values())  # type: ignore[arg-type]
    if constant_number(bound[1]) == 0:
        return bound[0]
    is_add = node.target is _aten.add.Tensor and bound[2] == 1
    return bound[1] if is_add and constant_number(bound[0]) == 0 else None


def _over_one(node: Node) -> Any:
    return (
        node.args[0]
        if len(node.args) == 2 and not node.kwargs and constant_number(node.args[1]) == 1
        else None
    )


def _dropout_off(node: Node) -> Any:
    x, p, train = node.args
    return x if train is False or p == 0 else None


def _cast(node: Node) -> Any:
    """The operand; or, past a cast that widened it, what was widened."""
    source: Any = node.args[0]
    if (
        isinstance(source, Node)
        and source.target is _aten._to_copy.default
        and isinstance(source.args[0], Node)
    ):
        first: Node = source.args[0]
        if (val(first).dtype, val(source).dtype) in _NARROW_IN_WIDE and val(first).dtype == val(node).dtype:
            return first
    return source


def _first(node: Node) -> Any:
    return node.args[0]


def _whole_slice(node: Node) -> Any:
    step = bind_schema(node.target, node.args, node.kwargs)["step"]  # type: ignore[arg-type]
    return node.args[0] if step == 1 else None


def _undone(node: Node) -> Any:
    """What was turned before, if this call turns it back."""
    source: Any = node.args[0]
    if source.op != "call_function" or source.target not in _TURNS:
        return None
    first, second = _order(source), _order(node)
    return source.args[0] if [first[d] for d in second] == list(range(len(first))) else None


def _order(node: Node) -> list[int]:
    """The permutation of dimensions that a transpose, `t` or permute makes."""
    rank = val(node).dim()
    if node.target is _aten.permute.default:
        return [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    swapped = list(range(rank))
    a, b = (node.args[1] % rank, node.args[2] % rank) if len(node.args) == 3 else (0, rank - 1)
    swapped[a], swapped[b] = b, a
    return swapped


_TURNS = (_aten.transpose.int, _aten.t.default, _aten.permute.default)
_STANDS_FOR: dict[Any, Callable[[Node], Any]] = {
    _aten.mul.Tensor: _times_one,
    _aten.mul.Scalar: _times_one,
    _aten.div.Tensor: _over_one,
    _aten.add.Tensor: _plus_zero,
    _aten.add.Scalar: _plus_zero,
    _aten.sub.Tensor: _plus_zero,
    _aten.sub.Scalar: _plus_zero,
    _aten._to_copy.default: _cast,
    _aten.type_as.default: _cast,
    _aten.dropout.default: _dropout_off,
    _aten.clone.default: _first,
    _aten.view.default: _first,
    _aten.reshape.default: _first,
    _aten.expand.default: _first,
    _aten.slice.Tensor: _whole_slice,
    **dict.fromkeys(_TURNS, _undone),
}
