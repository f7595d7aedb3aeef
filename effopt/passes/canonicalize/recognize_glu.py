"""Recognise gated linear units.

    activation(gate) * up  =>  glu(gate, up, activation)      activation: silu, gelu, tanh-gelu, relu, sigmoid
    aten.glu(x, dim)       =>  glu(x[second half], x[first half], "sigmoid")

Gate and up may be two tensors or two parts of a packed one. Exact. Inference and training.
Traffic of `[..., n]` tensors: 3 reads and 2 writes become 2 and 1.
Source: Shazeer 2020, arXiv:2002.05202, section 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from effopt.graph import ops
from effopt.graph.pattern import Named, OpBuilder, any_of, tensor
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import is_floating, shape_of, val
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
"""In the order of the pattern's alternatives."""


@dataclass(frozen=True)
class RecognizeGLU(Rewrite):
    """An activation that multiplies another tensor of its shape becomes `glu`."""

    name: ClassVar[str] = "recognize-glu"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    after: ClassVar[tuple[str, ...]] = ("recognize-activation",)

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        """Activations of gated layers; GELU and ReLU mostly stand alone."""
        return (_aten.silu.default, _aten.glu.default)

    def pattern(self, op: OpBuilder, x: Any, gate: Any, up: Any, dim: Any) -> Any:
        activated = any_of(
            op.silu(gate),
            op.gelu(gate),
            op.gelu(gate, approximate="tanh"),
            op.relu(gate),
            op.sigmoid(gate),
            tag="kind",
        )
        return any_of(op.mul(Named("activated", activated), tensor(up)), op.glu(x, dim))

    def legal(self, m: Match) -> None:
        if m.x is not None:
            return
        require(is_floating(m.gate) and is_floating(m.up), "gate and up are not floating tensors", m.root)
        require(
            m.up not in (m.gate, m.activated),
            "up is the gate itself: an activation, not a gated unit",
            m.root,
        )
        gate, up = shape_of(m.gate), shape_of(m.up)
        is_same = len(gate) == len(up) and all(
            statically_known_true(a == b) for a, b in zip(gate, up, strict=True)
        )
        require(is_same, f"gate is {list(gate)} and up is {list(up)}: one is broadcast", m.root)
        require(len(gate) > 0, "gate and up are single numbers", m.root)
        dtypes = val(m.gate).dtype, val(m.up).dtype
        require(dtypes[0] == dtypes[1], f"gate is {dtypes[0]} and up is {dtypes[1]}", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        if m.x is None:
            return emit(ops.glu, m.gate, m.up, _ACTIVATIONS[m.kind])
        size = shape_of(m.root)[m.dim]
        up = emit(_aten.slice.Tensor, m.x, m.dim, 0, size)
        gate = emit(_aten.slice.Tensor, m.x, m.dim, size, 2 * size)
        return emit(ops.glu, gate, up, "sigmoid")

    def samples(self) -> Iterable[Example]:
        gate, up = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
        yield Example(lambda g, u: F.silu(g) * u, (gate, up))
        yield Example(lambda g, u: u * F.gelu(g), (gate, up))
        yield Example(lambda g, u: F.gelu(g, approximate="tanh") * u, (gate.bfloat16(), up.bfloat16()))
        yield Example(lambda g, u: torch.relu(g) * u, (gate, up))
        yield Example(lambda g, u: torch.sigmoid(g) * u, (gate, up))
        yield Example(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], (gate,))
        yield Example(lambda x: F.silu(x[..., 12:]) * x[..., :12], (gate,))
        yield Example(lambda x: F.glu(x, -1), (gate,))

    def refusals(self) -> Iterable[Example]:
        gate = torch.randn(2, 5, 24)
        yield Example(lambda g, u: F.silu(g) * u, (gate, torch.randn(24)), "one is broadcast")
        yield Example(lambda g, u: F.silu(g) * u, (gate[..., :1], gate), "one is broadcast")
        yield Example(lambda g: F.silu(g) * g, (gate,), "up is the gate itself")
        yield Example(lambda g, u: F.silu(g) * u, (gate, gate.bfloat16()), "gate is torch.float32 and up")
        yield Example(lambda g, u: F.silu(g) + u, (gate, gate + 1), "used by aten.add.Tensor")
