"""Attention over a part of the keys, with what is needed to join it with other parts.

    scores = softcap(scale * query @ key^T) + bias, masked ones -inf
    lse    = log(sum(exp([scores, sinks])))
    out    = exp(scores - lse) @ value

Source: Dao et al. 2022, arXiv:2205.14135, algorithm 1 (the log-sum-exp of a row); Juravsky et al. 2024,
arXiv:2402.05099, section 3.1 (parts of one softmax).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from effopt.graph.ops.attention import band_share, open_keys, score_flops
from effopt.graph.ops.base import Operands, Sample, hint, op


def _fake(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:-1], value.shape[-1])), query.new_empty(
        query.shape[:-1], dtype=wide
    )


def _flops(operands: Operands, _: Any) -> float:
    return band_share({**operands, "anchors": None, "prefix": None}) * score_flops(operands)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for b, h, hkv, t, s, d in ((1, 2, 2, 7, 7, 16), (2, 4, 2, 1, 63, 32), (1, 3, 1, 100, 65, 8)):
        q = torch.randn(b, h, t, d, dtype=dtype, device=device)
        k = torch.randn(b, hkv, s, d, dtype=dtype, device=device)
        v = torch.randn(b, hkv, s, d, dtype=dtype, device=device)
        keep = torch.rand(b, 1, t, s, device=device) > 0.3
        keep[0, 0, 0] = False  # a row without keys
        ids = [torch.arange(n, device=device).expand(b, n) // 6 for n in (t, s)]
        yield Sample((q, k, v), {"scale": d**-0.5})
        yield Sample((q, k, v), {"scale": 0.3, "is_causal": True})
        yield Sample((q, k, v), {"scale": 0.3, "softcap": 5.0, "high": s - t})
        yield Sample((q, k, v), {"scale": 0.5, "mask": keep})
        yield Sample((q, k, v), {"scale": 0.5, "bias": torch.randn(1, h, t, s, dtype=dtype, device=device)})
        yield Sample(
            (q, k, v), {"scale": 0.5, "mask": keep, "sinks": torch.randn(h, device=device).to(dtype)}
        )
        yield Sample((q, k, v), {"scale": 0.5, "high": 2, "query_ids": ids[0], "key_ids": ids[1]})
        yield Sample((q, k, v), {"scale": 0.5, "low": 3, "high": 9})


def _reference_bytes(operands: Operands, _: Any) -> float:
    """Of all scores in float32: the product, the masks, the maximum, the exponent, the sum, the quotient."""
    rows = math.prod(map(hint, operands["query"].shape[:-1]))
    return 32.0 * rows * hint(operands["key"].shape[-2])


@op(flops=_flops, samples=_samples, fake=_fake, reference_bytes=_reference_bytes)
def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Optional[Tensor] = None,
    low: Optional[int] = None,
    high: Optional[int] = None,
    query_ids: Optional[Tensor] = None,
    key_ids: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `query` over some keys, and the logarithm of the sum that its softmax divides by.

    Args:
        query: `[b, h, t, d]`.
        key: `[b, hkv, s, d]`, `h` a multiple of `hkv`: query head i reads KV head `i // (h / hkv)`.
        value: `[b, hkv, s, dv]`.
        scale: multiplies the scores before everything else.
        bias: added to the scores, floating, broadcastable to `[b, h, t, s]`.
        mask: bool, broadcastable likewise; where False the score is -inf.
        is_causal: query i sees keys 0..i (aligned at the first key).
        softcap: `c * tanh(scores / c)` if nonzero, before bias and mask.
        sinks: `[h]`, one more logit per head that takes weight and gives no value; the log-sum-exp holds it.
        low: keys before query index + low are masked.
        high: keys after query index + high are masked.
        query_ids: integers `[t]` or `[b, t]`: keys of another id are masked.
        key_ids: `[s]` or `[b, s]`; given if and only if `query_ids` is.

    Returns:
        `[b, h, t, dv]` in the dtype of `query`, and `[b, h, t]` in float32 or wider; both contiguous. A row
        that sees no key (and no sink) gives 0 and -inf: it adds nothing to other parts.
    """
    accumulate = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    if group != 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (torch.matmul(query, key.transpose(-2, -1)) * scale).to(accumulate)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias
    t, s = query.shape[-2], key.shape[-2]
    causal = open_keys(t, s, query.device, high=0) if is_causal else None
    for seen in (mask, causal, open_keys(t, s, query.device, low, high, query_ids, key_ids)):
        scores = scores if seen is None else torch.where(seen, scores, float("-inf"))
    # By `max`, not `amax`, as in `attention`: Inductor's attention patterns begin at that.
    peak = scores.detach().max(dim=-1, keepdim=True).values
    sink = None if sinks is None else sinks.to(accumulate).view(-1, 1, 1)
    peak = peak if sink is None else torch.maximum(peak, sink.detach())
    blind = peak == float("-inf")
    peak = peak.masked_fill(blind, 0.0)  # finite, so that gradients of such a row are 0 and not NaN
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink - peak)
    total = total.masked_fill(blind, 1.0)
    lse = (peak + total.log()).masked_fill(blind, float("-inf"))
    return torch.matmul((weights / total).to(query.dtype), value), lse.squeeze(-1)
