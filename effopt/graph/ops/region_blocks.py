"""Which regions of keys a region of queries is routed to: those whose mean key is nearest to its mean query.

    affinity = mean of q over a region of queries @ mean of k over a region of keys
    blocks   = the `count` regions of largest affinity, for each region of queries

Source: Zhu et al. 2023, arXiv:2303.08810 (a region here is a run of tokens, not a square of an
image).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.graph.ops.base import Operands, Sample, hint, op
from effopt.graph.ops.block_sparse_attention import blocks_in


def _flops(operands: Operands, result: Any) -> float:
    query, key = operands["query"], operands["key"]
    return 2.0 * hint(result.numel()) * hint(query.shape[-1]) + hint(query.numel()) + hint(key.numel())


def _fake(query: Tensor, key: Tensor, *, block: int, **_: Any) -> Tensor:
    rows, columns = (blocks_in(x.shape[-2], block) for x in (query, key))
    return query.new_empty((*query.shape[:2], rows, columns), dtype=torch.bool)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for t, s in ((100, 100), (63, 63), (1, 40)):
        q = torch.randn(2, 4, t, 8, dtype=dtype, device=device)
        k = torch.randn(2, 2, s, 8, dtype=dtype, device=device)
        yield Sample((q, k), {"block": 16, "count": 2})
        yield Sample((q, k), {"block": 16, "count": 9})
        padding = torch.arange(s, device=device) >= torch.tensor([[0], [19]], device=device)
        yield Sample((q, k), {"block": 16, "count": 1, "key_mask": padding})


@op(flops=_flops, samples=_samples, fake=_fake)
def region_blocks(
    query: Tensor, key: Tensor, *, block: int, count: int, key_mask: Optional[Tensor] = None
) -> Tensor:
    """The regions of keys that each region of queries attends to.

    Args:
        query: `[b, h, t, d]`.
        key: `[b, hkv, s, d]`, `h` a multiple of `hkv`.
        block: tokens in a region; the last one may hold fewer, and its mean is of those.
        count: regions that are selected; all if there are no more.
        key_mask: bool `[b or 1, s]`, False where nothing sees a key: not in the mean. A region without any
            other key comes last.

    Returns:
        bool `[b, h, ceil(t / block), ceil(s / block)]`, for `block_sparse_attention`. Means and affinity
        accumulate in float32 or wider. Of equal affinities the first ones are taken.
    """
    heads, hkv = query.shape[1], key.shape[1]
    seen = torch.ones_like(key[:1, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    k, held = _means(key, seen, block)
    q, _ = _means(query, torch.ones_like(query[:1, 0, :, 0], dtype=torch.bool), block)
    affinity = q.unflatten(1, (hkv, heads // hkv)) @ k.unsqueeze(2).transpose(-2, -1)
    affinity = affinity.flatten(1, 2).masked_fill(~held[:, None, None, :], -math.inf)
    order = affinity.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(order.shape[-1], device=order.device) < count
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, kept.expand(order.shape))


def _means(x: Tensor, seen: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Means over the tokens seen in each block, `[b, h, n, d]`, and which blocks have one, `[b or 1, n]`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    more = blocks_in(x.shape[-2], block) * block - x.shape[-2]
    seen = F.pad(seen, (0, more)).unflatten(-1, (-1, block))
    counted = seen[:, None, :, :, None]
    tokens = F.pad(x, (0, 0, 0, more)).unflatten(-2, (-1, block)).to(wide)
    total = torch.where(counted, tokens, 0.0).sum(-2)
    return total / counted.sum(-2).clamp(min=1), seen.any(-1)
