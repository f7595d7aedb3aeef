"""Blocks of keys that are selected by their place alone.

    local_blocks:   j holds one of the first `sink` keys, or one within `window` of a query of i
    strided_blocks: the window, and every `stride`-th block before it, beginning at another one in each head:
                    blocks j with (j + head) % stride == 0, so that `stride` heads see all blocks together

Source: sink and window: Xiao et al. 2023, arXiv:2309.17453, section 3.2; Beltagy et al. 2020,
arXiv:2004.05150, section 3.1; shards: Lin et al. 2024, arXiv:2407.17678.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effopt.graph.ops.antidiagonal_blocks import blocks_before
from effopt.graph.ops.base import Operands, Sample, op
from effopt.graph.ops.block_sparse_attention import blocks_in


def near(rows: int, columns: int, device: torch.device, block: int, window: int, is_causal: bool) -> Tensor:
    """Blocks with a key less than `window` from a query of the block: bool `[rows, columns]`."""
    i, j = torch.arange(rows, device=device).unsqueeze(-1), torch.arange(columns, device=device)
    apart = ((i - j).abs() - 1) * block + 1
    close = apart < window
    return close & (j <= i) | (i == j) if is_causal else close | (i == j)


def _flops(operands: Operands, result: Any) -> float:
    return 0.0


def _fake_local(query: Tensor, key: Tensor, *, block: int, **_: Any) -> Tensor:
    sizes = (blocks_in(x.shape[-2], block) for x in (query, key))
    return query.new_empty((1, 1, *sizes), dtype=torch.bool)


def _fake_strided(query: Tensor, key: Tensor, *, block: int, **_: Any) -> Tensor:
    sizes = (blocks_in(x.shape[-2], block) for x in (query, key))
    return query.new_empty((1, query.shape[1], *sizes), dtype=torch.bool)


def _heads(dtype: torch.dtype, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    for t, s in ((100, 100), (63, 63), (1, 40)):
        yield (
            torch.randn(2, 4, t, 8, dtype=dtype, device=device),
            torch.randn(2, 2, s, 8, dtype=dtype, device=device),
        )


def _local_samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for given in _heads(dtype, device):
        yield Sample(given, {"block": 16, "sink": 4, "window": 20, "is_causal": True})
        yield Sample(given, {"block": 16, "sink": 0, "window": 20})


def _strided_samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for given in _heads(dtype, device):
        yield Sample(given, {"block": 16, "stride": 3, "window": 20})


@op(flops=_flops, samples=_local_samples, fake=_fake_local)
def local_blocks(
    query: Tensor, key: Tensor, *, block: int, sink: int, window: int, is_causal: bool = False
) -> Tensor:
    """The blocks of the first keys, and of those around each block of queries.

    Args:
        query: `[b, h, t, d]`, of which only the length is read.
        key: `[b, hkv, s, d]`, likewise.
        block: tokens in a block.
        sink: first keys that every query reads, rounded up to blocks.
        window: keys back from each query, itself included, that it reads at least; without causality as many
            on the other side.
        is_causal: no block of later keys is selected.

    Returns:
        bool `[1, 1, ceil(t / block), ceil(s / block)]`, for `block_sparse_attention`.
    """
    rows, columns = (blocks_in(x.shape[-2], block) for x in (query, key))
    first = torch.arange(columns, device=query.device) < blocks_in(sink, block)
    if is_causal:
        first = first & blocks_before(rows, columns, query.device)
    return (near(rows, columns, query.device, block, window, is_causal) | first)[None, None]


@op(flops=_flops, samples=_strided_samples, fake=_fake_strided)
def strided_blocks(query: Tensor, key: Tensor, *, block: int, stride: int, window: int) -> Tensor:
    """For each head, the blocks within a window and a shard of those before it; causal.

    Args:
        query: `[b, h, t, d]`, of which only heads and length are read.
        key: `[b, hkv, s, d]`, likewise.
        block: tokens in a block.
        stride: blocks from one of a shard to the next. All blocks are read by some head if `h >= stride`.
        window: keys back from each query, itself included, that every head reads at least.

    Returns:
        bool `[1, h, ceil(t / block), ceil(s / block)]`, for `block_sparse_attention`.
    """
    rows, columns = (blocks_in(x.shape[-2], block) for x in (query, key))
    head = torch.arange(query.shape[1], device=query.device).view(-1, 1, 1)
    shard = (torch.arange(columns, device=query.device) + head) % stride == 0
    shard = shard & blocks_before(rows, columns, query.device)
    return (shard | near(rows, columns, query.device, block, window, is_causal=True)).unsqueeze(0)
