"""Two parts of one attention, over different keys, as one.

    total = exp(lse) + exp(other_lse)
    out   = (exp(lse) * out + exp(other_lse) * other) / total,  lse = log(total)

Associative and commutative up to rounding: any number of parts is joined two by two.

Source: Juravsky et al. 2024, arXiv:2402.05099, section 3.1; Milakov & Gimelshein 2018, arXiv:1805.02867,
section 3.1 (the operation on which it stands).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from effopt.graph.ops.base import Sample, elementwise_flops, op


def _fake(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    wide = torch.promote_types(dtype, torch.float32)
    for b, h, t, d in ((1, 1, 1, 2), (2, 3, 7, 16), (1, 2, 63, 8)):
        out, other = (torch.randn(b, h, t, d, dtype=dtype, device=device) for _ in range(2))
        lse, other_lse = (4 * torch.randn(b, h, t, dtype=wide, device=device) for _ in range(2))
        yield Sample((out, lse, other, other_lse), {})
        one, both = lse.clone(), other_lse.clone()
        one[:, :, ::2], both[:, :, ::4] = float("-inf"), float("-inf")
        yield Sample((out, one, other, other_lse), {})
        yield Sample((out.mT.contiguous().mT, one, other, both), {})


@op(flops=elementwise_flops(4.0), samples=_samples, fake=_fake)
def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join what `attention_lse` gave for two sets of keys.

    Args:
        out: `[b, h, t, dv]`, floating.
        lse: `[b, h, t]`, float32 or wider.
        other: like `out`.
        other_lse: like `lse`.

    Returns:
        (out, lse) for all keys, contiguous, dtypes as given; computed in that of `lse`. Where one part saw no
        key (lse of -inf) the row is the other's, whatever `out` holds there; where neither did, 0 and -inf.
    """
    peak = torch.maximum(lse, other_lse).detach()
    blind = peak == float("-inf")
    peak = peak.masked_fill(blind, 0.0)
    ours, theirs = torch.exp(lse - peak), torch.exp(other_lse - peak)
    total = (ours + theirs).masked_fill(blind, 1.0)
    joined = torch.zeros_like(out, dtype=lse.dtype)
    for part, weight in ((out, ours), (other, theirs)):
        seen = (weight != 0).unsqueeze(-1)
        joined = joined + torch.where(seen, part.to(lse.dtype), 0.0) * (weight / total).unsqueeze(-1)
    together = (peak + total.log()).masked_fill(blind, float("-inf"))
    return joined.to(out.dtype).contiguous(), together.contiguous()
