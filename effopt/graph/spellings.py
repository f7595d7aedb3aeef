"""Spellings that several patterns share: casts that may be there, and inverse square roots."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effopt.graph.pattern import ANY, AnyOf, OpBuilder, any_of
from effopt.graph.rewrite import Match
from effopt.graph.values import val

_aten = torch.ops.aten


def maybe_cast(op: OpBuilder, inner: Any) -> AnyOf:
    """`inner`, or `inner` in another dtype; which one, `casts_of` tells."""
    return any_of(op._to_copy(inner, dtype=ANY), op.type_as(inner, ANY), inner)


def casts_of(m: Match, node: Node) -> set[torch.dtype]:
    """The dtypes that a match casts `node` to."""
    casts = (_aten._to_copy.default, _aten.type_as.default)
    return {val(n).dtype for n in m.nodes if n.target in casts and n.args[0] is node}


def square(op: OpBuilder, x: Any) -> AnyOf:
    """`x` times itself."""
    return any_of(op.pow(x, 2), op.mul(x, x), op.square(x))


def over_root(op: OpBuilder, x: Any, y: Any) -> AnyOf:
    """`x / sqrt(y)`."""
    return any_of(op.mul(inverse_root(op, y), x), op.div(x, root(op, y)))


def root(op: OpBuilder, y: Any) -> AnyOf:
    """`sqrt(y)`."""
    return any_of(op.sqrt(y), op.pow(y, 0.5))


def inverse_root(op: OpBuilder, y: Any) -> AnyOf:
    """`1 / sqrt(y)`."""
    return any_of(
        op.rsqrt(y), op.pow(y, -0.5), op.mul(op.reciprocal(root(op, y)), 1), op.reciprocal(root(op, y))
    )
