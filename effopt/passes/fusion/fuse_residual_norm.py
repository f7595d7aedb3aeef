"""Fuse a residual addition with the normalisation of its sum.

    total = x + residual; rms_norm(total)    =>  normed, total = add_rms_norm(x, residual)
    total = x + residual; layer_norm(total)  =>  normed, total = add_layer_norm(x, residual)

Exact: the sum is rounded as before, and whoever else reads it gets it from the second result.
Inference and training. Traffic of `[..., d]` tensors: 3 reads and 2 writes become 2 and 2.
Source: fused dropout, residual and layer norm, github.com/Dao-AILab/flash-attention, csrc/layer_norm.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.pattern import ANY, Named, OpBuilder, any_of, tensor
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import shape_of, val
from effopt.passes.base import Example, Rewrite, Stage


@dataclass(frozen=True)
class FuseResidualNorm(Rewrite):
    """An addition that a norm reads becomes one op with two results."""

    name: ClassVar[str] = "fuse-residual-norm"
    stage: ClassVar[Stage] = Stage.FUSE

    def pattern(
        self, op: OpBuilder, x: Any, residual: Any, weight: Any, bias: Any, eps: Any, shape: Any
    ) -> Any:
        total = Named("total", op.add(tensor(x), tensor(residual)))
        return any_of(
            op["effopt.rms_norm"](total, weight, eps, weight_offset=ANY, round_first=ANY),
            op.layer_norm(total, shape, weight, bias, eps, ANY),
        )

    def legal(self, m: Match) -> None:
        require(m.shape is None or len(m.shape) == 1, "more than the last dimension is normalised", m.root)
        x, residual = shape_of(m.x), shape_of(m.residual)
        is_same = len(x) == len(residual) and all(
            statically_known_true(a == b) for a, b in zip(x, residual, strict=True)
        )
        require(is_same, f"x is {list(x)} and the residual is {list(residual)}: one is broadcast", m.total)
        dtypes = val(m.x).dtype, val(m.residual).dtype
        require(dtypes[0] == dtypes[1], f"x is {dtypes[0]} and the residual is {dtypes[1]}", m.total)

    def outputs(self, m: Match) -> tuple[Node, ...]:
        """The norm, and the sum for its other readers."""
        return m.root, m.total

    def rewrite(self, emit: Emit, m: Match) -> Any:
        if m.shape is None:
            both = emit(ops.add_rms_norm, m.x, m.residual, *m.root.args[1:], **m.root.kwargs)
        else:
            both = emit(ops.add_layer_norm, m.x, m.residual, m.weight, m.bias, m.eps)
        return emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)

    def samples(self) -> Iterable[Example]:
        x, y, w = torch.randn(2, 5, 24), torch.randn(2, 5, 24), torch.rand(24)
        rms_norm, layer_norm = torch.ops.effopt.rms_norm, torch.layer_norm
        yield Example(lambda x, y, w: rms_norm(x + y, w, 1e-6), (x, y, w))
        yield Example(lambda x, y, w: (rms_norm(x + y, w, 1e-6, weight_offset=1.0), (x + y).cos()), (x, y, w))
        yield Example(_both, (x.bfloat16(), y.bfloat16(), w.bfloat16()))
        yield Example(lambda x, y, w: layer_norm(x + y, [24], w, w), (x, y, w))
        yield Example(lambda x, y: layer_norm(x + y, [24]) + (y + x), (x, y))

    def refusals(self) -> Iterable[Example]:
        x, w = torch.randn(2, 5, 24), torch.rand(24)
        rms_norm, layer_norm = torch.ops.effopt.rms_norm, torch.layer_norm
        yield Example(lambda x, y, w: rms_norm(x + y, w, 1e-6), (x, torch.randn(24), w), "one is broadcast")
        yield Example(lambda x, y: layer_norm(x + y, [5, 24]), (x, x + 1), "more than the last dimension")
        yield Example(lambda x, y: layer_norm(x + y, [24]), (x, x.bfloat16()), "and the residual is")


def _both(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return torch.ops.effopt.rms_norm(total, w, 1e-6, round_first=True), total
