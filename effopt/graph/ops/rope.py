"""Rotary position embedding.

    half rotation:  [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin],  x1, x2 the halves of the rotated part
    interleaved:    the same with x1 the even and x2 the odd positions

Source: Su et al. 2021, arXiv:2104.09864, equation 34.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effopt.graph.ops.base import Sample, elementwise_flops, op


def _fake(x: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for b, h, t, d, rotary in ((1, 1, 1, 2, 2), (2, 3, 7, 16, 16), (1, 2, 63, 32, 8)):
        x = torch.randn(b, t, h, d, dtype=dtype, device=device).transpose(1, 2)
        angle = torch.randn(b, 1, t, rotary // 2, device=device)
        half = torch.cat((angle, angle), -1)
        yield Sample((x, half.cos().to(dtype), half.sin().to(dtype)), {})
        pairs = angle.repeat_interleave(2, -1)
        yield Sample((x, pairs.cos().to(dtype), pairs.sin().to(dtype)), {"interleaved": True})


@op(flops=elementwise_flops(4.0), samples=_samples, fake=_fake)
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first `r = cos.shape[-1]` of the last dimension; the rest passes through.

    Args:
        x: `[..., t, d]`, floating, any strides.
        cos: `[..., t, r]`, broadcastable to `x[..., :r]`, same dtype.
        sin: like `cos`.
        interleaved: pairs are neighbours (GPT-J) instead of halves (NeoX, Llama).

    Returns:
        `[..., t, d]`, contiguous, dtype of `x`.
    """
    rotary = cos.shape[-1]
    turned = x[..., :rotary]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        partner = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), dim=-1)
    out = turned * cos + partner * sin
    if rotary != x.shape[-1]:
        out = torch.cat((out, x[..., rotary:]), dim=-1)
    return out.contiguous()
