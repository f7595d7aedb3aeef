"""Where the tables of a rotation come from: which product of positions and frequencies their angles are.

    angle = positions[:, None] * frequencies;  rope(x, angle.cos(), angle.sin())

Follows what only lays a table out: views, casts, repetition, a constant factor of cos and sin. A table that
is made outside of the graph, in a buffer or by the caller, has no product here. Looks only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses.collected import JOINS
from effopt.graph.constants import SCALINGS
from effopt.graph.rewrite import require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten
_VIEWS = {
    *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints),
    *(_aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default, _aten.transpose.int),
    *(_aten.permute.default, _aten.slice.Tensor, _aten.mT.default, _aten.t.default, _aten.select.int),
    *(_aten.clone.default, _aten.contiguous.default, _aten.detach.default, _aten.alias.default),
    *(_aten._to_copy.default, _aten.to.dtype, _aten.repeat.default, _aten.repeat_interleave.self_int),
}
_LOOKUPS = {_aten.index.Tensor, _aten.embedding.default, _aten.index_select.default}
_PRODUCTS = {
    *(_aten.mul.Tensor, _aten.matmul.default, _aten.bmm.default, _aten.outer.default),
    _aten.einsum.default,
}


@dataclass(frozen=True)
class RotaryTable:
    """The angles of one or more rotations."""

    product: Node
    """Of positions and frequencies; all rotations that read it are turned by it."""
    frequencies: Node
    """The operand of it that is no position."""
    half: int
    """Angles of one position."""


def table_of(rope: Node) -> RotaryTable:
    """The product that both tables of a rotation stand on. Raises `Reject`."""
    bound = ops.rope.bind(rope.args, rope.kwargs)
    angles = [_source(bound[name], {trig}) for name, trig in _TRIGONOMETRY.items()]
    products = [_source(a.args[0], _PRODUCTS) for a in angles]
    same = f"cos and sin are of {products[0].name} and {products[1].name}, not of the same angles"
    require(products[0] is products[1], same, rope)
    args: Any = products[0].args
    sides = args[1] if products[0].target is _aten.einsum.default else args[:2]
    require(len(sides) == 2, f"{products[0].name} is a product of {len(sides)} tensors", rope)
    moved = [_is_position(side) for side in sides]
    which = f"which operand of {products[0].name} holds positions: none, or both, are whole numbers"
    require(moved.count(True) == 1, which, rope)
    frequencies: Any = sides[moved.index(False)]
    require(is_floating(frequencies), f"the frequencies {frequencies} are not floating", rope)
    return RotaryTable(products[0], frequencies, int(shape_of(bound["cos"])[-1]) // 2)


_TRIGONOMETRY = {"cos": _aten.cos.default, "sin": _aten.sin.default}


def _source(node: Any, wanted: set[Any]) -> Node:
    """The call of `wanted` that a table is laid out from. Raises `Reject`."""
    first = node
    while node.target not in wanted or _factored(node) is not None:
        source = _laid_out_from(node)
        made = f"{first.name} comes from {node.name}, an input or a buffer: the table is made outside"
        require(source is not None or node.op == "call_function", made, node)
        require(source is not None, f"{first.name} is computed by {node.target}, which is not followed", node)
        node = source
    return node


def _laid_out_from(node: Node) -> Node | None:
    """The one operand whose elements `node` holds, times a number perhaps."""
    if node.op != "call_function":
        return None
    if node.target in _VIEWS or node.target in _LOOKUPS:
        return node.args[0] if isinstance(node.args[0], Node) else None
    if node.target in JOINS:
        parts: set[Any] = set(node.args[0])  # type: ignore[arg-type]
        return parts.pop() if len(parts) == 1 else None
    return _factored(node)


def _factored(node: Node) -> Node | None:
    """What a node multiplies by a number."""
    if node.target not in SCALINGS:
        return None
    a, b = node.args[:2]
    if _is_number(b) and isinstance(a, Node):
        return a
    turned = node.target is _aten.mul.Tensor and _is_number(a)
    return b if turned and isinstance(b, Node) else None


def _is_number(operand: Any) -> bool:
    """Whether an operand is one number. With dynamic sizes Dynamo hands numbers in as inputs."""
    value = val(operand)
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def _is_position(node: Any) -> bool:
    """Whether a value is whole numbers, laid out and cast."""
    while isinstance(node, Node):
        value = val(node)
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
            return True
        node = _laid_out_from(node)
    return False
