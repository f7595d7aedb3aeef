"""Recognise activations that are spelled out.

    x * sigmoid(x)                                                =>  silu(x)
    x / (1 + exp(-x))                                             =>  silu(x)
    0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))         =>  gelu(x, approximate="tanh")
    0.5 * x * (1 + erf(x / sqrt(2)))                              =>  gelu(x)

Exact up to reassociation; in half precision the op rounds once where the spelling rounds each step.
Inference and training. Traffic: up to 9 passes over `x` become 1.
Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from effopt.graph.pattern import OpBuilder, any_of, tensor
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import is_floating
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeActivation(Rewrite):
    """SiLU and both forms of GELU become the ATen op."""

    name: ClassVar[str] = "recognize-activation"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        """What a spelled-out GELU has and little else does."""
        return (_aten.erf.default,)

    def pattern(self, op: OpBuilder, x: Any) -> Any:
        x = tensor(x)
        silu = any_of(op.mul(x, op.sigmoid(x)), op.div(x, op.add(op.exp(op.neg(x)), 1)))
        cube = any_of(op.pow(x, 3), op.mul(op.mul(x, x), x), op.mul(op.pow(x, 2), x))
        inner = any_of(
            op.add(x, op.mul(cube, 0.044715)),
            # x + 0.044715 * x * x * x, multiplied from the left
            op.add(x, op.mul(op.mul(op.mul(x, 0.044715), x), x)),
        )
        factored = op.mul(op.mul(x, math.sqrt(2 / math.pi)), op.add(op.mul(op.mul(x, 0.044715), x), 1))
        bent = op.tanh(any_of(op.mul(inner, math.sqrt(2 / math.pi)), factored))
        step = op.erf(any_of(op.div(x, math.sqrt(2)), op.mul(x, math.sqrt(0.5))))
        return any_of(
            *silu.options,
            *_half_times(op, x, op.add(bent, 1)).options,
            *_half_times(op, x, op.add(step, 1)).options,
            tag="kind",
        )

    def legal(self, m: Match) -> None:
        require(is_floating(m.x), "x is not floating", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        if m.kind < 2:
            return emit(_aten.silu.default, m.x)
        return emit(_aten.gelu.default, m.x, approximate="tanh" if m.kind < 5 else "none")

    def samples(self) -> Iterable[Example]:
        x = torch.randn(3, 24)
        yield Example(lambda x: x * torch.sigmoid(x), (x,))
        yield Example(lambda x: x / (1 + torch.exp(-x)), (x,))
        yield Example(
            lambda x: (
                0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
            ),
            (x,),
        )
        yield Example(lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))), (x,))
        yield Example(lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), (x,))
        yield Example(lambda x: 0.5 * (x * (1.0 + torch.erf(x * 0.7071067811865476))), (x.bfloat16(),))

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(3, 24)
        yield Example(lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.5)), (x,), "expected 1.414")
        yield Example(lambda x: F.relu(x) * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), (x,), "in another")
        yield Example(lambda x: x * 0.5 * (2.0 + torch.erf(x / math.sqrt(2.0))), (x,), "expected 1")


def _half_times(op: OpBuilder, x: Any, factor: Any) -> Any:
    """`0.5 * x * factor` in the three groupings."""
    half = op.mul(x, 0.5)
    return any_of(op.mul(half, factor), op.mul(x, op.mul(factor, 0.5)), op.mul(op.mul(x, factor), 0.5))
