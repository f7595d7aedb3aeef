"""Layer normalisation: ATen's own op is canonical; the form after a residual addition is ours.

Source: Ba et al. 2016, arXiv:1607.06450, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from effopt.graph.ops.base import Sample, adopt, elementwise_flops, op


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for shape in ((1, 1), (3, 63), (2, 5, 100), (4, 256)):
        x = torch.randn(shape, dtype=dtype, device=device)
        weight = torch.randn(shape[-1], dtype=dtype, device=device)
        bias = torch.randn(shape[-1], dtype=dtype, device=device)
        yield Sample((x, [shape[-1]], weight, bias, 1e-5), {})
        yield Sample((x, [shape[-1]], weight, None, 1e-5), {})
        yield Sample((x, [shape[-1]], None, None, 1e-6), {})


def _samples_add(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for sample in _samples(dtype, device):
        x, _, weight, bias, eps = sample.args
        yield Sample((x, torch.randn_like(x), weight, bias, eps), {})


def _fake_add(x: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x + residual)
    return torch.empty_like(total, memory_format=torch.contiguous_format), total


layer_norm = adopt(
    torch.ops.aten.layer_norm.default, name="layer_norm", flops=elementwise_flops(8.0), samples=_samples
)


@op(flops=elementwise_flops(9.0), samples=_samples_add, fake=_fake_add)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """`total = x + residual`, then layer norm of the last dimension. Returns (normalised, total).

    Args:
        x: `[..., d]`, floating.
        residual: the same shape and dtype as `x`.
        weight: `[d]` or None.
        bias: `[d]` or None.
        eps: added to the variance.
    """
    total = x + residual
    return torch.layer_norm(total, [total.shape[-1]], weight, bias, eps), total
