"""Numbers that are known when compiling, however the graph spells them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

_aten = torch.ops.aten
_TRANSPARENT = {
    _aten.lift_fresh_copy.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.expand.default,
    _aten.view.default,
    _aten.reshape.default,
    _aten.unsqueeze.default,
}
_FILLED = {
    _aten.full.default: 1,
    _aten.scalar_tensor.default: 0,
    _aten.new_full.default: 2,
    _aten.full_like.default: 1,
}
SCALINGS = {_aten.mul.Tensor: 1, _aten.mul.Scalar: 1, _aten.div.Tensor: -1, _aten.div.Scalar: -1}
"""Calls that multiply by their second operand, and to which power of it."""
_ZEROS = {_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default}
_ONES = {_aten.ones.default, _aten.new_ones.default, _aten.ones_like.default}


def constant_number(value: Any) -> int | float | None:
    """The number that `value` is in every element, or None if it is not known to be one.

    Reads literals, `full`, `zeros`, `ones`, `scalar_tensor`, and 0-d tensors stored in the graph,
    through copies, casts and expansions. Symbolic numbers are not known.
    """
    if type(value) in (int, float):
        return value
    while isinstance(value, Node):
        if value.op == "get_attr":
            return _stored(value)
        if value.op != "call_function":
            return None
        if value.target in _FILLED:
            value = value.args[_FILLED[value.target]]
            return value if type(value) in (int, float) else None
        if value.target in _ZEROS:
            return 0.0
        if value.target in _ONES:
            return 1.0
        if value.target not in _TRANSPARENT:
            return None
        value = value.args[0]
    return None


def scaled(node: Node) -> tuple[Node, float] | None:
    """`x` and `n`, if a call is `x` times a number other than 0: `x * n`, `n * x`, `x / n` or `-x`."""
    if node.target is _aten.neg.default:
        return node.args[0], -1.0  # type: ignore[return-value]
    if node.target not in SCALINGS:
        return None
    x, by = node.args[:2]
    number = constant_number(by)
    if number is None and SCALINGS[node.target] > 0:
        x, number = by, constant_number(x)
    return (x, float(number) ** SCALINGS[node.target]) if number and isinstance(x, Node) else None


def _stored(node: Node) -> int | float | None:
    owner = node.graph.owning_module
    held: Any = owner
    for part in str(node.target).split("."):
        held = getattr(held, part, None)
    # Only lifted literals: a 0-d parameter or buffer can change between calls.
    is_literal = isinstance(held, torch.Tensor) and held.dim() == 0 and "_tensor_constant" in str(node.target)
    if not is_literal or isinstance(held, torch._subclasses.FakeTensor):
        return None
    number = held.item()
    return number if type(number) in (int, float) else None


def guarded_number(value: Any) -> int | float | None:
    """`constant_number`, or the present value of a symbolic one, which the graph is then compiled for.

    With `dynamic=True` a model's float attributes are symbols. Reading one adds a guard: when it changes,
    the graph is compiled anew. Ask only for numbers that must be known, after everything else matched.
    """
    number = constant_number(value)
    if number is not None:
        return number
    held = value.meta.get("val") if isinstance(value, Node) else value
    if isinstance(held, torch.SymFloat) and held.node.hint is not None:
        return float(held)
    return None
