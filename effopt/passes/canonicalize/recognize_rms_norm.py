"""Recognise RMSNorm, however it is spelled.

    x -> [float32] -> square -> mean(-1) -> + eps -> rsqrt -> * x -> [back] -> * weight -> [back]
      =>  rms_norm(x, weight, eps)

Exact up to reassociation in the accumulation dtype; a norm that is squared in half precision is
refused, for the op accumulates in float32 and does not overflow there. Inference and training.
Traffic of `[..., d]` tensors: 4 reads and 3 writes become 1 and 1.
Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.constants import guarded_number
from effopt.graph.pattern import Named, OpBuilder, any_of, number
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.spellings import casts_of, inverse_root, maybe_cast, over_root, square
from effopt.graph.values import shape_of, val
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeRMSNorm(Rewrite):
    """Every spelling of RMSNorm becomes `rms_norm`."""

    name: ClassVar[str] = "recognize-rms-norm"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        """The inverse root is what every spelling has."""
        return (_aten.rsqrt.default, _aten.sqrt.default, _aten.mean.dim, _aten.rms_norm.default)

    def pattern(self, op: OpBuilder, x: Any, weight: Any, eps: Any, offset: Any, shape: Any, d: Any) -> Any:
        h = maybe_cast(op, x)
        squared = Named("square", square(op, h))
        mean = any_of(op.mean(squared, [-1], True), op.div(op.sum(squared, [-1], True), number(d)))
        shifted = op.add(mean, eps)
        normed = over_root(op, h, shifted)
        factor = maybe_cast(op, weight)
        scale = Named("scale", any_of(op.add(factor, number(offset)), factor))
        scaled = any_of(
            op.mul(Named("inner", maybe_cast(op, normed)), scale),
            op.mul(h, Named("early", op.mul(inverse_root(op, shifted), scale))),
            op.mul(Named("early", op.mul(h, scale)), inverse_root(op, shifted)),
        )
        norms = (*maybe_cast(op, scaled).options, *maybe_cast(op, normed).options)
        return any_of(op.rms_norm(x, shape, weight, eps), *norms)

    def legal(self, m: Match) -> None:
        x = val(m.x)
        require(
            isinstance(x, torch.Tensor) and x.dim() > 0, "x is not a tensor with a last dimension", m.root
        )
        require(x.dtype.is_floating_point, f"x is {x.dtype}, not floating", m.root)
        require(m.shape is None or len(m.shape) == 1, "more than the last dimension is normalised", m.root)
        require(
            m.d is None or statically_known_true(x.shape[-1] == m.d),
            f"the sum is divided by {m.d}, not d",
            m.root,
        )
        if m.square is not None:
            _require_wide(m, x.dtype)
        if m.weight is not None:
            is_vector = len(shape_of(m.weight)) == 1 and statically_known_true(
                shape_of(m.weight)[0] == x.shape[-1]
            )
            require(is_vector, f"weight is {list(shape_of(m.weight))}, not [d]", m.root)
            require(
                m.scale is None or _scale_is_op_scale(m),
                "the weight is rounded otherwise than rms_norm does",
                m.root,
            )
        require(val(m.root).dtype == x.dtype, f"the result is {val(m.root).dtype}, x is {x.dtype}", m.root)
        if m.eps is not None:
            eps = guarded_number(m.eps)
            require(eps is not None, "eps is not known when compiling", m.root)
            require(eps is None or eps >= 0, f"eps is negative ({eps})", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        wide = torch.promote_types(val(m.x).dtype, torch.float32)
        # aten.rms_norm without eps takes that of the dtype it accumulates in.
        eps = torch.finfo(wide).eps if m.eps is None else float(guarded_number(m.eps) or 0.0)
        extra: dict[str, Any] = {"weight_offset": float(m.offset)} if m.offset else {}
        if m.inner is not None and val(m.inner).dtype == val(m.x).dtype != wide:
            extra["round_first"] = True
        return emit(ops.rms_norm, m.x, m.weight, eps, **extra)

    def samples(self) -> Iterable[Example]:
        x, w = torch.randn(2, 5, 24), torch.rand(24)
        yield Example(lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w, (x, w))
        yield Example(lambda x, w: w * (x / torch.sqrt(1e-5 + (x * x).mean(2, keepdim=True))), (x, w))
        yield Example(lambda x: x * (x.square().sum(-1, keepdim=True) / 24 + 1e-6) ** -0.5, (x,))
        yield Example(lambda x, w: torch.rms_norm(x, [24], w), (x, w))
        yield Example(_gemma, (x.bfloat16(), w.bfloat16()))
        yield Example(_llama, (x.bfloat16(), w.bfloat16()))
        # A weight that the op cannot take, by its dtype or its shape, stays a product behind it.
        yield Example(_llama, (x.half(), w))
        yield Example(_llama, (torch.randn(2, 24, 24), torch.rand(24, 24)))

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(2, 24, 24)
        root, square = torch.rsqrt, torch.square
        yield Example(lambda x: x * root(square(x).mean(1, True) + 1e-6), (x,), "dim is [1], expected [-1]")
        yield Example(lambda x: x * root(square(x).mean(-1) + 1e-6), (x[0],), "keepdim is False")
        yield Example(lambda x, y: y * root(square(x).mean(-1, True) + 1e-6), (x, x + 1), "in another")
        yield Example(lambda x: x * root(square(x).mean(-1, True) * 2), (x,), "expected add")
        yield Example(lambda x: x * root(square(x).mean(-1, True) + -1e-6), (x,), "eps is negative")
        yield Example(
            lambda x, e: x * root(square(x).mean(-1, True) + e), (x, x[0, 0, :1]), "eps is not known"
        )
        yield Example(lambda x: x * root(square(x).sum(-1, True) / 23 + 1e-6), (x,), "divided by 23")
        yield Example(lambda x: x * root(square(x).mean(-1, True) + 1e-6), (x.half(),), "would not overflow")


def _require_wide(m: Match, narrow: torch.dtype) -> None:
    wide, taken = torch.promote_types(narrow, torch.float32), val(m.square).dtype
    reason = f"the square is taken in {taken}, not in {wide}: rms_norm would not overflow there"
    require(taken == wide, reason, m.square)
    require(casts_of(m, m.x) <= {narrow, wide}, f"x is cast to another dtype than {wide}", m.root)
    require(m.inner is None or val(m.inner).dtype in (narrow, wide), "the normed value is cast away", m.root)
    require(m.early is None or val(m.early).dtype == wide, f"the weight is not applied in {wide}", m.root)


def _scale_is_op_scale(m: Match) -> bool:
    """Whether the weight reaches the product with the roundings of `weight.to(dtype) + offset`."""
    normed, scale, weight = val(m.inner or m.early).dtype, val(m.scale).dtype, val(m.weight).dtype
    is_raw = m.scale is m.weight and torch.promote_types(weight, normed) == normed
    return bool(scale == normed or is_raw)


def _llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _gemma(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)
