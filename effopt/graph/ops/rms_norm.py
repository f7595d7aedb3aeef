"""Root-mean-square normalisation, alone and after a residual addition.

    rms_norm(x) = x * rsqrt(mean(x^2) + eps) * (weight + weight_offset)

Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from effopt.graph.ops.base import Sample, elementwise_flops, op


def _fake(x: Tensor, weight: Optional[Tensor] = None, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_add(x: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual)
    return torch.empty_like(total, memory_format=torch.contiguous_format), total


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for shape in ((1, 1), (3, 63), (2, 5, 100), (4, 256)):
        x = torch.randn(shape, dtype=dtype, device=device)
        weight = torch.randn(shape[-1], dtype=dtype, device=device)
        yield Sample((x, weight, 1e-6), {})
        yield Sample((x, weight, 1e-5), {"weight_offset": 1.0})
        yield Sample((x, weight, 1e-6), {"round_first": True})
        yield Sample((x, None, 1e-6), {})


def _samples_add(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for sample in _samples(dtype, device):
        x, *rest = sample.args
        yield Sample((x, torch.randn_like(x), *rest), sample.kwargs)


def _norm(x: Tensor, weight: Optional[Tensor], eps: float, offset: float, round_first: bool) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype)
    if weight is not None:
        scale = weight.to(normed.dtype)
        normed = normed * (scale + offset if offset else scale)
    return normed.to(x.dtype).contiguous()


@op(flops=elementwise_flops(5.0), samples=_samples, fake=_fake)
def rms_norm(
    x: Tensor,
    weight: Optional[Tensor],
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_first: bool = False,
) -> Tensor:
    """Normalise the last dimension of `x`.

    Args:
        x: `[..., d]`, floating.
        weight: `[d]`, or None for no scale.
        eps: added to the mean square.
        weight_offset: added to the weight (Gemma's `1 + w`).
        round_first: round to the dtype of `x` before the weight is applied (Llama), not after.

    Returns:
        `[..., d]`, contiguous, dtype of `x`. Accumulated in float32 or wider.
    """
    return _norm(x, weight, eps, weight_offset, round_first)


@op(flops=elementwise_flops(6.0), samples=_samples_add, fake=_fake_add)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Optional[Tensor],
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """`total = x + residual`, then `rms_norm(total)`. Returns (normalised, total), both `[..., d]`."""
    total = x + residual
    return _norm(total, weight, eps, weight_offset, round_first), total
