"""Rows of a table that is kept as small integers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from effopt.graph.ops.base import Sample, elementwise_flops, op
from effopt.graph.packing import pack
from effopt.graph.round_to_nearest import dequantize, round_to_nearest


def _fake(
    ids: Tensor, packed: Tensor, scale: Tensor, zero: Optional[Tensor] = None, *, width: int, **_: Any
) -> Tensor:
    return scale.new_empty((*ids.shape, width))


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for bits in (8, 4):
        for ids, n, k, group in (
            ((1,), 1, 1, 0),
            ((2, 5), 63, 100, 32),
            ((0,), 7, 63, 0),
            ((3,), 10, 63, 16),
        ):
            for symmetric in (True, False):
                weight = torch.randn(n, k, dtype=dtype, device=device)
                codes, scale, zero = round_to_nearest(weight, bits=bits, group=group, symmetric=symmetric)
                given = (torch.randint(n, ids, device=device), pack(codes, bits), scale, zero)
                yield Sample(given, {"bits": bits, "group": group, "width": k})


@op(flops=elementwise_flops(2.0), samples=_samples, fake=_fake)
def quantized_embedding(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Optional[Tensor] = None,
    *,
    bits: int,
    group: int,
    width: int,
) -> Tensor:
    """Row `id` of `(code - zero) * scale`, for each id, computed in float32 and rounded to the scale's dtype.

    Args:
        ids: `[...]`, integer, in `[0, n)`.
        packed: `[n, ceil(width * bits / 8)]`, uint8.
        scale: `[n, groups]`, floating.
        zero: `[n, groups]`, uint8; None for `2**(bits-1)`.
        bits: of a code.
        group: numbers of a row that share a scale; 0 for the whole row.
        width: numbers of a row. The last byte may hold fewer codes than it has room for.

    Returns:
        `[..., width]`, dtype of `scale`.
    """
    rows = packed[ids], scale[ids], None if zero is None else zero[ids]
    return dequantize(*rows, bits=bits, group=group, length=width).to(scale.dtype)
