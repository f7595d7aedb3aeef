"""Which blocks of keys matter to a block of queries, judged by sums over strided antidiagonals of the scores.

    cell = the sum of q[i + a] @ k[j + stride - 1 - a] over a < stride, for i and j multiples of stride
    mass of a block = the sum of softmax(scale / stride * cell) over its cells
    blocks = for each block of queries the fewest blocks whose masses reach `threshold` of the whole

Every query and every key of a cell is in its antidiagonal once, and each column or diagonal of large scores
crosses it. `stride` of them in one product: 1 / stride of the arithmetic of all scores.

Source: Xu et al. 2025, arXiv:2503.16428, sections 2.1 and 2.2, algorithm 1.
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


def diagonal_blocks(rows: int, columns: int, device: torch.device) -> Tensor:
    """Whether a block of keys is the one of the queries themselves: bool `[rows, columns]`."""
    return torch.arange(columns, device=device) == torch.arange(rows, device=device).unsqueeze(-1)


def blocks_before(rows: int, columns: int, device: torch.device) -> Tensor:
    """Whether causality leaves a pair of a block of keys: bool `[rows, columns]`."""
    return torch.arange(columns, device=device) <= torch.arange(rows, device=device).unsqueeze(-1)


def fewest_blocks(mass: Tensor, threshold: float) -> Tensor:
    """Of each row the largest masses that together reach `threshold` of their sum: bool, shape of `mass`."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < threshold * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _flops(operands: Operands, _: Any) -> float:
    query, s = operands["query"], hint(operands["key"].shape[-2])
    pairs = math.prod(map(hint, query.shape[:-1])) * s / operands["stride"]
    return pairs * (2.0 * hint(query.shape[-1]) + 5.0 / operands["stride"])


def _fake(query: Tensor, key: Tensor, *, block: int, **_: Any) -> Tensor:
    rows, columns = (blocks_in(x.shape[-2], block) for x in (query, key))
    return query.new_empty((*query.shape[:2], rows, columns), dtype=torch.bool)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for b, h, hkv, t, s in ((1, 2, 2, 100, 100), (2, 4, 2, 63, 63), (1, 2, 1, 1, 40)):
        q, k = (torch.randn(shape, dtype=dtype, device=device) for shape in ((b, h, t, 16), (b, hkv, s, 16)))
        settings = {"block": 16, "stride": 8, "threshold": 0.7, "scale": 0.25}
        yield Sample((q, k), {**settings, "is_causal": t == s})
        yield Sample((q, k), {**settings, "threshold": 1.0})
        padding = torch.arange(s, device=device) >= torch.full((b, 1), 19, device=device)
        yield Sample((q, k), {**settings, "is_causal": t == s, "key_mask": padding})


@op(flops=_flops, samples=_samples, fake=_fake)
def antidiagonal_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block: int,
    stride: int,
    threshold: float,
    scale: float,
    is_causal: bool = False,
    key_mask: Optional[Tensor] = None,
) -> Tensor:
    """The blocks of keys that hold most of the weight, by antidiagonals.

    Args:
        query: `[b, h, t, d]`.
        key: `[b, hkv, s, d]`, `h` a multiple of `hkv`.
        block: tokens in a block.
        stride: tokens in a cell; divides `block`.
        threshold: share of the mass that the selected blocks reach, 0 to 1. 1 selects every block.
        scale: of the attention.
        is_causal: blocks of later keys are not selected, and that of the queries themselves is.
        key_mask: bool `[b or 1, s]`, False where nothing sees a key.

    Returns:
        bool `[b, h, ceil(t / block), ceil(s / block)]`, for `block_sparse_attention`. The softmax accumulates
        in float32 or wider. A NaN or infinite score has no mass.
    """
    t, s = query.shape[-2], key.shape[-2]
    rows, columns = blocks_in(t, block), blocks_in(s, block)
    if threshold >= 1.0:
        return query.new_ones((*query.shape[:2], rows, columns), dtype=torch.bool)
    weights = _cell_weights(query, key, rows * block, columns * block, stride, scale, is_causal, key_mask)
    cells = block // stride
    b, h = query.shape[:2]
    mass = weights.reshape(b, h, rows, cells, columns, cells).sum((3, 5))
    selected = fewest_blocks(mass, threshold)
    if not is_causal:
        return selected
    at = (rows, columns, query.device)
    return (selected | diagonal_blocks(*at)) & blocks_before(*at)


def _cell_weights(
    query: Tensor,
    key: Tensor,
    t_whole: int,
    s_whole: int,
    stride: int,
    scale: float,
    is_causal: bool,
    key_mask: Optional[Tensor],
) -> Tensor:
    """Softmax over cells, `[b, h, t_whole / stride, s_whole / stride]`; 0 past the ends."""
    b, h, t, d = query.shape
    hkv, s = key.shape[1], key.shape[2]
    seen = torch.arange(s_whole, device=key.device) < s
    if key_mask is not None:
        key = torch.where(key_mask[:, None, :, None], key, 0.0)
        seen = F.pad(key_mask, (0, s_whole - s))
    q = F.pad(query, (0, 0, 0, t_whole - t)).reshape(b, hkv, h // hkv, t_whole // stride, stride, d)
    k = F.pad(key, (0, 0, 0, s_whole - s)).reshape(b, hkv, 1, s_whole // stride, stride * d)
    # Queries of a cell backwards, keys forwards: the products of a row are those of its antidiagonal.
    cells = q.flip(4).flatten(4) @ k.transpose(-2, -1)
    cells = cells.to(torch.promote_types(query.dtype, torch.float32)) * (scale / stride)
    cells = cells.flatten(1, 2)
    seen = seen.reshape(-1, 1, 1, s_whole // stride, stride).any(-1)
    if is_causal:
        seen = seen & blocks_before(t_whole // stride, s_whole // stride, query.device)
    weights = torch.softmax(cells.masked_fill(~seen, -math.inf), dim=-1).nan_to_num(0.0)
    inside = torch.arange(t_whole // stride, device=query.device) * stride < t
    return weights * inside.unsqueeze(-1)
