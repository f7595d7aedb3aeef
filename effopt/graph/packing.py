"""Small unsigned integers, several to a byte.

Codes lie along the last dimension, the first of a byte in its lowest bits: with 4 bits, codes 0 and 1
share byte 0, code 0 in the low nibble. A last byte that is not full is filled with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTHS = (1, 2, 4, 8)
"""Bits of a code: those that divide a byte, so that no code lies across two."""


def packed_length(length: int, bits: int) -> int:
    """Bytes that hold `length` codes."""
    return -(-length * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes`, `[..., k]` of integers in `[0, 2**bits)`, to uint8 `[..., ceil(k * bits / 8)]`.

    Raises:
        ValueError: for a width that does not divide a byte.
    """
    _check(bits)
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % per_byte))
    parts = codes.unflatten(-1, (codes.shape[-1] // per_byte, per_byte)).unbind(-1)
    packed = torch.zeros_like(parts[0])
    for index, part in enumerate(parts):
        packed = packed | (part << (index * bits))
    return packed


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The codes in `packed`, uint8 `[..., length]`. Inverse of `pack`; errors as there."""
    _check(bits)
    if bits == 8:
        return packed[..., :length]
    mask = 2**bits - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)[..., :length]


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits cannot be packed; a byte holds codes of {WIDTHS} bits")
