"""Recognise layer normalisation that is spelled out.

    x -> [float32] -> (x - mean) / sqrt(mean((x - mean)^2) + eps) -> * weight -> + bias -> [back]
      =>  layer_norm(x, [d], weight, bias, eps)

Exact up to reassociation in float32. Inference and training. Traffic of `[..., d]` tensors: 6 reads
and 5 writes become 1 and 1.
Source: Ba et al. 2016, arXiv:1607.06450, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.constants import guarded_number
from effopt.graph.pattern import Named, OpBuilder, any_of
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.spellings import casts_of, maybe_cast, over_root, square
from effopt.graph.values import shape_of, val
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeLayerNorm(Rewrite):
    """Every spelling of layer norm becomes `aten.layer_norm`."""

    name: ClassVar[str] = "recognize-layer-norm"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        """A variance; where it is spelled out, `recognize-rms-norm` tells of a root that it leaves."""
        return (_aten.var.correction, _aten.var.dim)

    def pattern(
        self, op: OpBuilder, x: Any, weight: Any, bias: Any, eps: Any, correction: Any, unbiased: Any
    ) -> Any:
        h = maybe_cast(op, x)
        centered = op.sub(h, op.mean(h, [-1], True))
        variance = any_of(
            op.mean(Named("square", square(op, centered)), [-1], True),
            Named("square", op.var(h, [-1], correction=correction, keepdim=True)),
            Named("square", op.var(h, [-1], unbiased=unbiased, keepdim=True)),
        )
        normed = over_root(op, centered, op.add(variance, eps))
        scaled = op.mul(normed, Named("scale", maybe_cast(op, weight)))
        shift = Named("shift", maybe_cast(op, bias))
        moved = any_of(op.add(scaled, shift), scaled, op.add(normed, shift), normed)
        first, second, _ = maybe_cast(op, moved).options
        return any_of(first, second, *moved.options)

    def legal(self, m: Match) -> None:
        x = val(m.x)
        require(
            isinstance(x, torch.Tensor) and x.dim() > 0, "x is not a tensor with a last dimension", m.root
        )
        require(x.dtype.is_floating_point, f"x is {x.dtype}, not floating", m.root)
        wide = torch.promote_types(x.dtype, torch.float32)
        if m.square.target in (_aten.var.correction, _aten.var.dim):
            by_correction = m.square.target is _aten.var.correction
            divides_by_d = m.correction == 0 if by_correction else m.unbiased is False
            require(divides_by_d, "the variance is unbiased: it divides by d - 1, layer_norm by d", m.square)
        require(
            val(m.square).dtype == wide,
            f"the variance is taken in {val(m.square).dtype}, not in {wide}",
            m.square,
        )
        require(casts_of(m, m.x) <= {x.dtype, wide}, f"x is cast to another dtype than {wide}", m.root)
        for operand, used in ((m.weight, m.scale), (m.bias, m.shift)):
            if operand is not None:
                _require_parameter(operand, used, x, m)
        require(val(m.root).dtype == x.dtype, f"the result is {val(m.root).dtype}, x is {x.dtype}", m.root)
        eps = guarded_number(m.eps)
        require(eps is not None, "eps is not known when compiling", m.root)
        require(eps is None or eps >= 0, f"eps is negative ({eps})", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return emit(
            ops.layer_norm, m.x, [shape_of(m.x)[-1]], m.weight, m.bias, float(guarded_number(m.eps) or 0.0)
        )

    def samples(self) -> Iterable[Example]:
        x, w, b = torch.randn(2, 5, 24), torch.rand(24), torch.rand(24)
        yield Example(lambda x, w, b: _spelled(x) * w + b, (x, w, b))
        yield Example(lambda x, w: w * _spelled(x), (x, w))
        yield Example(lambda x, w: _spelled(x) * (1 + w), (x, w))
        yield Example(lambda x, b: b + _spelled(x), (x, b))
        yield Example(_by_variance, (x, w, b))
        yield Example(
            lambda x, w: (w.float() * _spelled(x.float())).to(x.dtype), (x.bfloat16(), w.bfloat16())
        )

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(24, 24)
        yield Example(
            lambda x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5), (x,), "d - 1"
        )
        yield Example(
            lambda x: (x - x.mean(0, True)) * torch.rsqrt(x.var(-1, False, True) + 1e-5),
            (x,),
            "dim is [0], expected",
        )
        yield Example(
            lambda x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(0, False, True) + 1e-5), (x,), "dim is [0]"
        )
        yield Example(lambda x: _by_variance(x, x[0], x[0]), (x.half(),), "taken in torch.float16")
        yield Example(
            lambda x, y: (x - y.mean(-1, True)) * torch.rsqrt(x.var(-1, False, True) + 1e-5),
            (x, x + 1),
            "in another",
        )


def _require_parameter(operand: Any, used: Any, x: torch.Tensor, m: Match) -> None:
    shape = shape_of(operand)
    is_vector = len(shape) == 1 and statically_known_true(shape[0] == x.shape[-1])
    require(is_vector, f"weight or bias is {list(shape)}, not [d]", m.root)
    dtype = val(operand).dtype
    require(
        dtype == x.dtype, f"weight or bias is {dtype}, x is {x.dtype}: layer_norm takes one dtype", m.root
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    require(val(used).dtype in (dtype, wide), f"weight or bias is cast to {val(used).dtype}", m.root)


def _spelled(x: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5)


def _by_variance(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * w + b
