"""Scaled dot-product attention with everything that models add to it.

    scores = softcap(scale * query @ key^T) + bias
    apart  = key index - query index, anchor = key index < anchors, ahead = key index < prefix
    open   = mask and (low <= apart or anchor) and (apart <= high or ahead) and (ids are equal or anchor)
    scores = open ? scores : fill, causal
    out    = dropout(softmax([scores, sinks])[..., :s]) @ value

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped queries: Ainslie et al. 2023,
arXiv:2305.13245; soft-cap: Gemma Team 2024, arXiv:2408.00118; sinks: Xiao et al. 2023,
arXiv:2309.17453.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from effopt.graph.ops.base import Operands, Sample, hint, op


def _fake(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def open_keys(
    t: int,
    s: int,
    device: torch.device,
    low: Optional[int] = None,
    high: Optional[int] = None,
    query_ids: Optional[Tensor] = None,
    key_ids: Optional[Tensor] = None,
    anchors: Optional[int] = None,
    prefix: Optional[int] = None,
) -> Optional[Tensor]:
    """Which of `s` keys each of `t` queries sees by band and ids: `[t, s]` or `[b, 1, t, s]`; None: all."""
    keys = torch.arange(s, device=device)
    apart = keys - torch.arange(t, device=device).unsqueeze(-1)
    conditions: list[tuple[Tensor, Optional[int]]] = []
    if low is not None:
        conditions.append((apart >= low, anchors))
    if high is not None:
        conditions.append((apart <= high, prefix))
    if query_ids is not None and key_ids is not None:
        same = query_ids.unsqueeze(-1) == key_ids.unsqueeze(-2)
        conditions.append((same.unsqueeze(1) if same.dim() == 3 else same, anchors))
    seen: Optional[Tensor] = None
    for condition, always in conditions:
        condition = condition if always is None else condition | (keys < always)
        seen = condition if seen is None else seen & condition
    return seen


def band_share(operands: Operands) -> float:
    """Share of (query, key) pairs that the band of a call leaves open, `is_causal` included."""
    t, s = hint(operands["query"].shape[-2]), hint(operands["key"].shape[-2])
    low = -t if operands["low"] is None else hint(operands["low"])
    high = s if operands["high"] is None else hint(operands["high"])
    high = min(high, 0) if operands["is_causal"] else high
    if not t or not s:
        return 1.0
    anchors, ahead = (0 if operands[name] is None else hint(operands[name]) for name in ("anchors", "prefix"))
    rows = [round(i * (t - 1) / 63) for i in range(64)]
    lasts = (min(s - 1, max(row + high, 0 if operands["is_causal"] else ahead - 1)) for row in rows)
    seen = 0
    for row, last in zip(rows, lasts, strict=True):
        first = max(0, row + low)
        seen += max(0, last - first + 1) + max(0, min(anchors, first, last + 1))
    return seen / (64 * s)


def _flops(operands: Operands, _: Any) -> float:
    return band_share(operands) * score_flops(operands)


def score_flops(operands: Operands) -> float:
    """Floating-point operations of all pairs, those that are masked included."""
    query, key, value = operands["query"], operands["key"], operands["value"]
    # Not Size.numel(), which would fix symbolic sizes at their hints.
    rows, s = math.prod(map(hint, query.shape[:-1])), hint(key.shape[-2])
    return rows * s * (2.0 * hint(query.shape[-1]) + 2.0 * hint(value.shape[-1]) + 5.0)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for b, h, hkv, t, s, d in ((1, 2, 2, 7, 7, 16), (2, 4, 2, 1, 63, 32), (1, 3, 1, 100, 100, 8)):
        q = torch.randn(b, h, t, d, dtype=dtype, device=device)
        k = torch.randn(b, hkv, s, d, dtype=dtype, device=device)
        v = torch.randn(b, hkv, s, d, dtype=dtype, device=device)
        keep = torch.rand(b, 1, t, s, device=device) > 0.3
        keep[..., 0] = True
        yield Sample((q, k, v), {"scale": d**-0.5})
        yield Sample((q, k, v), {"scale": 0.3, "is_causal": t == s, "softcap": 5.0})
        yield Sample((q, k, v), {"scale": 0.5, "mask": keep})
        yield Sample((q, k, v), {"scale": 0.5, "bias": torch.randn(1, h, t, s, dtype=dtype, device=device)})
        yield Sample((q, k, v), {"scale": 0.5, "sinks": torch.randn(h, dtype=dtype, device=device)})
        one_blind = keep.clone()
        one_blind[0, 0, 0] = False
        yield Sample((q, k, v), {"scale": 0.5, "mask": one_blind, "fill": torch.finfo(dtype).min})
        yield Sample((q, k, v), {"scale": 0.5, "mask": one_blind, "zero_masked_rows": True})
        yield Sample(
            (q, k, v), {"scale": 0.5, "low": s - t - 5, "high": s - t, "fill": torch.finfo(dtype).min}
        )
        ids = [torch.arange(n, device=device).expand(b, n) // 6 for n in (t, s)]
        yield Sample((q, k, v), {"scale": 0.5, "high": 2, "query_ids": ids[0], "key_ids": ids[1]})
        window = {"low": s - t - 5, "high": s - t, "anchors": 3}
        yield Sample((q, k, v), {"scale": 0.5, **window})
        yield Sample((q, k, v), {"scale": 0.5, "high": s - t, "prefix": 9})
        packed = {"query_ids": ids[0], "key_ids": ids[1], "anchors": 1}
        yield Sample((q, k, v), {"scale": 0.5, "is_causal": t == s, **packed})


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    b, hkv, s, d = x.shape
    return x.unsqueeze(2).expand(b, hkv, heads // hkv, s, d).reshape(b, heads, s, d)


def _softmax(scores: Tensor, sinks: Optional[Tensor], zero_masked_rows: bool) -> Tensor:
    """Softmax over keys, spelled with `max` so that no downstream matcher takes it for its own.

    Inductor's attention patterns begin at `amax`; a graph that reaches them here was judged
    already, with masks and dropout that they would not keep (pytorch/pytorch#196468).
    """
    peak = scores.detach().max(dim=-1, keepdim=True).values
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(-1, 1, 1)
        peak = torch.maximum(peak, sink.detach())
    blind = peak == float("-inf")
    if zero_masked_rows:
        # Finite before exp, so that the gradient of such a row is 0 and not 0 * NaN.
        peak = peak.masked_fill(blind, 0.0)
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    if zero_masked_rows:
        total = total.masked_fill(blind, 1.0)
    return weights / total


def _reference_bytes(operands: Operands, _: Any) -> float:
    """Of all scores in float32: the product, the masks, the maximum, the exponent, the sum, the quotient."""
    rows = math.prod(map(hint, operands["query"].shape[:-1]))
    return 32.0 * rows * hint(operands["key"].shape[-2])


@op(flops=_flops, samples=_samples, fake=_fake, reference_bytes=_reference_bytes)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    fill: Optional[float] = None,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    zero_masked_rows: bool = False,
    rows_see_key: bool = False,
    low: Optional[int] = None,
    high: Optional[int] = None,
    query_ids: Optional[Tensor] = None,
    key_ids: Optional[Tensor] = None,
    anchors: Optional[int] = None,
    prefix: Optional[int] = None,
) -> Tensor:
    """Attention of `query` over `key` and `value`.

    Args:
        query: `[b, h, t, d]`, or any leading dimensions if `key` has the same ones.
        key: `[b, hkv, s, d]`, `h` a multiple of `hkv`: query head i reads KV head `i // (h / hkv)`.
        value: `[b, hkv, s, dv]`.
        scale: multiplies the scores before everything else.
        bias: added to the scores, floating, broadcastable to `[b, h, t, s]`.
        mask: bool, broadcastable likewise; where False the score is replaced by `fill`.
        fill: the replacing score, -inf if None.
        is_causal: query i sees keys 0..i (aligned at the first key).
        softcap: `c * tanh(scores / c)` if nonzero, before bias and mask.
        sinks: `[h]`, one more logit per head that takes weight and gives no value.
        dropout_p: probability of dropping a weight; the kept ones are scaled.
        zero_masked_rows: rows that see no key give 0, as SDPA does. Otherwise NaN, as softmax does.
        rows_see_key: proved that there is no such row. Changes no value: a kernel may leave out their care.
        low: keys before query index + low are masked, as by `mask`.
        high: keys after query index + high are masked likewise.
        query_ids: integers `[t]` or `[b, t]` (for 4 dimensions): keys of another id are masked likewise.
        key_ids: `[s]` or `[b, s]`; given if and only if `query_ids` is.
        anchors: the first so many keys are not masked by `low` and ids.
        prefix: the first so many keys are not masked by `high`.

    Returns:
        `[b, h, t, dv]`, contiguous, dtype of `query`. The softmax accumulates in float32 or wider.
    """
    accumulate = torch.promote_types(query.dtype, torch.float32)
    if query.dim() == 4 and key.shape[1] != query.shape[1]:
        key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    scores = (torch.matmul(query, key.transpose(-2, -1)) * scale).to(accumulate)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    floor = float("-inf") if fill is None else fill
    t, s = query.shape[-2], key.shape[-2]
    for seen in (mask, open_keys(t, s, query.device, low, high, query_ids, key_ids, anchors, prefix)):
        if seen is not None:
            scores = torch.where(seen, scores, floor)
    if is_causal:
        rows = torch.arange(t, device=query.device).unsqueeze(-1)
        scores = torch.where(torch.arange(s, device=query.device) <= rows, scores, float("-inf"))
    weights = _softmax(scores, sinks, zero_masked_rows).to(query.dtype)
    if dropout_p:
        weights = torch.dropout(weights, dropout_p, True)
    return torch.matmul(weights, value)


OPTIONS: tuple[str, ...] = tuple(a.name for a in attention.overload._schema.arguments if a.kwarg_only)
"""Names of all arguments but the three operands, for passes that capture and hand on a whole call."""
