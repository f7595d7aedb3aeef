"""Weights as small integers with a scale for each group: what rounding means, and its inverse.

    symmetric:   scale = max|w| / (2**(bits-1) - 1)          code = round(w / scale) + 2**(bits-1)
    asymmetric:  scale = (max(w, 0) - min(w, 0)) / (2**bits - 1)
                 zero = round(-min(w, 0) / scale)            code = round(w / scale) + zero
    weight = (code - zero) * scale, where zero = 2**(bits-1) if symmetric

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1; groups as in Yao et al. 2022, arXiv:2206.01861.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.graph.packing import pack, packed_length, unpack

_MOST_ELEMENTS = 2**24
"""Quantised at once: 64 MiB in float32, times the few copies that the arithmetic makes."""


class Quantized(NamedTuple):
    """Codes and what turns them back into weights."""

    codes: Tensor
    """`[..., k]`, uint8, in `[0, 2**bits)`."""
    scale: Tensor
    """`[..., groups]`, the weight's dtype."""
    zero: Tensor | None
    """`[..., groups]`, uint8: the code of 0. None if symmetric: `2**(bits-1)`."""


def group_count(length: int, group: int) -> int:
    """Groups in a row; `group=0` makes the row one group, and the last group may be shorter."""
    return -(-length // group) if group else 1


def round_to_nearest(weight: Tensor, *, bits: int, group: int = 0, symmetric: bool = True) -> Quantized:
    """Quantise each group of each row of `weight`.

    Everything is computed in float32 (float64 for float64 weights); the scale is rounded to the weight's
    dtype before it divides, so the stored numbers are exactly those that the codes were made with. Ties go
    to the even code. A group of zeros has scale 1, as has one whose scale is too small for the dtype. A group
    that holds NaN or infinity gives NaN for all of its weights.

    Args:
        weight: `[..., k]`, floating.
        bits: of a code, at most 8.
        group: weights that share a scale, along the last dimension; 0 for the whole row.
        symmetric: codes around the middle and no zero; the lowest code is then not used.
    """
    k = weight.shape[-1]
    group = group or max(k, 1)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Filled up with zeros: they widen no range, for the asymmetric one holds 0 anyway.
    grouped = F.pad(wide, (0, -k % group)).unflatten(-1, (-1, group)) if k else wide.unsqueeze(-1)
    grouped = grouped if k else F.pad(grouped, (0, 0, 0, 1))
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = _stored(grouped.abs().amax(-1) / most, weight.dtype)
        codes = _nearest(grouped, scale, -most, most) + 2 ** (bits - 1)
        zero = None
    else:
        most = 2**bits - 1
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = _stored((high - low) / most, weight.dtype)
        zero = _nearest(-low.unsqueeze(-1), scale, 0, most).squeeze(-1)
        codes = (_nearest(grouped, scale, -most, most) + zero.unsqueeze(-1)).clamp(0, most)
        zero = zero.to(torch.uint8)
    return Quantized(codes.flatten(-2)[..., :k].to(torch.uint8), scale, zero)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scale.to(dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _nearest(grouped: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (grouped / scale.to(grouped.dtype).unsqueeze(-1)).round().clamp(low, high).nan_to_num(0)


def quantize_rows(weight: Tensor, *, bits: int, group: int, symmetric: bool) -> tuple[Tensor, ...]:
    """`round_to_nearest` of `[n, k]`, packed: (packed, scale), and zero if not symmetric."""
    rows = max(1, _MOST_ELEMENTS // max(1, weight.shape[-1]))
    parts = []
    for chunk in weight.split(rows):
        codes, scale, zero = round_to_nearest(chunk, bits=bits, group=group, symmetric=symmetric)
        parts.append((pack(codes, bits), scale) if zero is None else (pack(codes, bits), scale, zero))
    return tuple(torch.cat(same) for same in zip(*parts, strict=True))


def quantized_bytes(n: int, k: int, scale_bytes: int, *, bits: int, group: int, symmetric: bool) -> int:
    """Bytes of what `quantize_rows` gives for `[n, k]`, scales of `scale_bytes` each."""
    groups = group_count(k, group) * (scale_bytes if symmetric else scale_bytes + 1)
    return n * (packed_length(k, bits) + groups)


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group: int, length: int
) -> Tensor:
    """The weights that packed codes stand for, float32 (float64 for float64 scales) `[..., length]`.

    Args:
        packed: `[..., ceil(length * bits / 8)]`, uint8.
        scale: `[..., groups]`, floating.
        zero: `[..., groups]`, or None for `2**(bits-1)`.
        bits: of a code.
        group: weights that share a scale; 0 for the whole row.
        length: weights of a row.
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    codes = unpack(packed, bits, length).to(wide)
    offset = 2.0 ** (bits - 1) if zero is None else _over_groups(zero.to(wide), group, length)
    return (codes - offset) * _over_groups(scale.to(wide), group, length)


def _over_groups(value: Tensor, group: int, length: int) -> Tensor:
    """`[..., groups]` -> `[..., length]`, or `[..., 1]` where the row is one group."""
    if not group or value.shape[-1] == 1:
        return value
    if length % group == 0:
        return value.unsqueeze(-1).expand(*value.shape, group).flatten(-2)
    # Not the same and a slice of it: Inductor 2.13 reads beyond what it wrote where a product follows.
    return value[..., torch.arange(length, device=value.device) // group]
