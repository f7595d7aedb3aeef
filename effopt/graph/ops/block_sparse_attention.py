"""Attention over selected blocks of keys: each head and each block of queries has its own.

    out = attention(query, key, value, mask=blocks[.., i // block, j // block] and key_mask, ..)

Source: Child et al. 2019, arXiv:1904.10509, section 4 (attention over a set of keys for each query); blocks
of them: Dao et al. 2022, arXiv:2205.14135, section 3.3; how they are said: docs/design/0008.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from effopt.graph.ops.attention import attention, score_flops
from effopt.graph.ops.base import Operands, Sample, hint, op

MASKED_ROWS = ("nan", "zero", "mean")
"""What a row that sees no key gives."""


def blocks_in(tokens: Any, block: int) -> Any:
    """Blocks that hold so many tokens; the last one may be ragged."""
    return (tokens + block - 1) // block


def selected_keys(blocks: Tensor, t: int, s: int, block: int) -> Tensor:
    """Which of `s` keys each of `t` queries may see: bool `[b or 1, h or 1, t, s]`."""
    rows, columns = (torch.arange(n, device=blocks.device) // block for n in (t, s))
    return blocks.index_select(-2, rows).index_select(-1, columns)


def open_pairs(t: int, s: int, block: int, is_causal: bool) -> Tensor:
    """Pairs of query and key that each pair of blocks holds, float64 `[ceil(t/block), ceil(s/block)]`."""
    rows = torch.arange(t, dtype=torch.float64)
    first = torch.arange(blocks_in(s, block), dtype=torch.float64) * block
    seen = (torch.clamp(rows + 1, max=s) if is_causal else torch.full_like(rows, s)).unsqueeze(-1)
    by_row = (seen - first).clamp(0, block)
    by_row = torch.nn.functional.pad(by_row, (0, 0, 0, blocks_in(t, block) * block - t))
    return by_row.unflatten(0, (-1, block)).sum(1)


def share_of_pairs(blocks: Tensor, t: int, s: int, block: int, is_causal: bool) -> float:
    """Share of the pairs which causality leaves open that lie in selected blocks: the density of a call."""
    pairs = open_pairs(t, s, block, is_causal)
    held = (blocks.to("cpu", torch.float64) * pairs).sum((-2, -1)).mean()
    return float(held / pairs.sum()) if t and s else 1.0


def _flops(operands: Operands, _: Any) -> float:
    t, s = hint(operands["query"].shape[-2]), hint(operands["key"].shape[-2])
    share = 1.0
    if operands["is_causal"] and t and s:
        most = min(t, s)
        share = (most * (most + 1) / 2 + max(0, t - s) * s) / (t * s)
    return float(operands["density"]) * share * score_flops(operands)


def _reference_bytes(operands: Operands, _: Any) -> float:
    """Of all scores: as `attention` makes them, and the selection as a mask."""
    rows = math.prod(map(hint, operands["query"].shape[:-1]))
    return 34.0 * rows * hint(operands["key"].shape[-2])


def _fake(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, **_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    generator = torch.Generator(device).manual_seed(0)
    for b, h, hkv, t, s, d in ((1, 2, 2, 100, 100, 16), (2, 4, 2, 63, 63, 8), (1, 3, 1, 1, 40, 24)):
        shapes = ((b, h, t, d), (b, hkv, s, d), (b, hkv, s, d))
        q, k, v = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
        sizes = (b, h, blocks_in(t, 16), blocks_in(s, 16))
        some = torch.rand(sizes, generator=generator, device=device) > 0.5
        some = some | torch.eye(sizes[2], sizes[3], dtype=torch.bool, device=device)
        none = some.clone()
        none[:, :, -1] = False
        padding = torch.arange(s, device=device) >= torch.tensor([[3]] * b, device=device)
        common: dict[str, Any] = {"block": 16, "scale": d**-0.5}
        yield Sample((q, k, v, some), common)
        yield Sample((q, k, v, some), {**common, "is_causal": True, "softcap": 3.0})
        yield Sample((q, k, v, torch.ones_like(some[:, :1])), {**common, "is_causal": True})
        for rows in MASKED_ROWS:
            more = {"key_mask": padding, "is_causal": t == s, "masked_rows": rows}
            yield Sample((q, k, v, none), {**common, **more})


@op(flops=_flops, samples=_samples, fake=_fake, reference_bytes=_reference_bytes)
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    *,
    block: int,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    key_mask: Optional[Tensor] = None,
    masked_rows: str = "nan",
    density: float = 1.0,
) -> Tensor:
    """Attention of each query over the keys in the blocks that are selected for its block and head.

    Args:
        query: `[b, h, t, d]`.
        key: `[b, hkv, s, d]`, `h` a multiple of `hkv`: query head i reads KV head `i // (h / hkv)`.
        value: `[b, hkv, s, dv]`.
        blocks: bool `[b or 1, h or 1, ceil(t / block), ceil(s / block)]`; where False, no query of that block
            sees a key of that block. Blocks that causality hides may hold either.
        block: tokens in a block, of queries and of keys.
        scale: multiplies the scores before everything else.
        is_causal: query i sees keys 0..i of its blocks (aligned at the first key).
        softcap: `c * tanh(scores / c)` if nonzero.
        key_mask: bool `[b or 1, s]`, False where nothing sees a key, as in padding.
        masked_rows: what a row that sees no key gives: `nan`, as softmax does; `zero`, as SDPA does; `mean`
            of all values of its head, as scores that are filled with a finite number do.
        density: about the share of pairs open by causality that selected blocks hold, 0 to 1. Changes no
            value: costs are counted with it. 1 where nothing is known.

    Returns:
        `[b, h, t, dv]`, contiguous, dtype of `query`. With all blocks selected, what `attention` gives. The
        softmax accumulates in float32 or wider. `blocks` gets no gradient.
    """
    seen = selected_keys(blocks, query.shape[-2], key.shape[-2], block)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    out = attention.reference(
        query,
        key,
        value,
        scale=scale,
        mask=seen,
        is_causal=is_causal,
        softcap=softcap,
        zero_masked_rows=masked_rows != "nan",
    )
    if masked_rows != "mean":
        return out
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device).unsqueeze(-1)
        seen = seen & (torch.arange(key.shape[-2], device=query.device) <= rows)
    return torch.where(seen.any(-1, keepdim=True), out, mean_of_values(value, query.shape[1]))


def mean_of_values(value: Tensor, heads: int) -> Tensor:
    """Mean of all values for each query head, `[b, h, 1, dv]`, accumulated in float32 or wider."""
    wide = torch.promote_types(value.dtype, torch.float32)
    mean = value.mean(dim=-2, keepdim=True, dtype=wide).to(value.dtype)
    return mean.repeat_interleave(heads // value.shape[1], dim=1)
