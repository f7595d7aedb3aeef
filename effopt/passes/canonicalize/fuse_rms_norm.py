"""Recognise RMSNorm, however it is spelled."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.pattern import OpBuilder, any_of, number
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import val
from effopt.passes.base import Rewrite, Stage


@dataclass(frozen=True)
class FuseRMSNorm(Rewrite):
    """docstring"""
    name: ClassVar[str] = "recognize-rms-norm"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (torch.ops.aten.rsqrt.default,)

    def pattern(self, op: OpBuilder, x: Any, weight: Any, eps: Any, up: Any, down: Any) -> Any:  # type: ignore[override]
        h = any_of(op._to_copy(x, dtype=up), x)
        square = any_of(op.pow(h, 2), op.mul(h, h))
        rms2 = op.add(op.mean(square, [-1], True), number(eps))
        normed = any_of(op.mul(h, op.rsqrt(rms2)), op.div(h, op.sqrt(rms2)))
        return op.mul(any_of(op._to_copy(normed, dtype=down), normed), weight)

    def legal(self, m: Match) -> None:
        require(isinstance(m.weight, Node) and val(m.weight).dim() == 1, "weight is not [D]", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return emit(ops.rms_norm, m.x, m.weight, m.eps, round_first=True)
