"""A linear layer whose weight is kept as small integers, and multiplied as floating-point numbers.

linear(input, dequantize(packed, scale, zero), bias)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.graph.ops.base import Operands, Sample, hint, op
from effopt.graph.packing import pack
from effopt.graph.round_to_nearest import dequantize, round_to_nearest


def _fake(input: Tensor, packed: Tensor, *_: Any, **__: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], packed.shape[0]))


def _flops(operands: Operands, result: Any) -> float:
    return 2.0 * hint(result.numel()) * hint(operands["input"].shape[-1])


def _reference_bytes(operands: Operands, _: Any) -> float:
    """The weight in float32, written and read."""
    return 8.0 * hint(operands["packed"].shape[0]) * hint(operands["input"].shape[-1])


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for bits in (8, 4):
        for (*rows, k, n), group in (
            ((1, 1, 1), 0), ((2, 3, 63, 100), 0), ((1, 100, 63), 32), ((5, 128, 32), 64),
            ((0, 8, 4), 0), ((1, 1, 256, 48), 128), ((33, 130, 17), 16),
        ):  # fmt: skip
            x = torch.randn(*rows, k, dtype=dtype, device=device)
            bias = torch.randn(n, dtype=dtype, device=device)
            for symmetric in (True, False):
                weight = torch.randn(n, k, dtype=dtype, device=device)
                codes, scale, zero = round_to_nearest(weight, bits=bits, group=group, symmetric=symmetric)
                given = (x, pack(codes, bits), scale, zero, bias if symmetric else None)
                yield Sample(given, {"bits": bits, "group": group})


@op(flops=_flops, samples=_samples, fake=_fake, reference_bytes=_reference_bytes)
def quantized_linear(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """`input @ weight^T + bias`, where `weight = (code - zero) * scale`.

    The weight is computed in float32, rounded to the dtype of `input`, and multiplied as `linear` does.

    Args:
        input: `[..., k]`, floating.
        packed: `[n, ceil(k * bits / 8)]`, uint8, codes in the order of `graph/packing.py`.
        scale: `[n, groups]`, floating; one for each group of each row.
        zero: `[n, groups]`, uint8; None for `2**(bits-1)`, the symmetric form.
        bias: `[n]`, or None.
        bits: of a code.
        group: weights along `k` that share a scale, the last group may be shorter; 0 for the whole row.

    Returns:
        `[..., n]`, dtype of `input`.
    """
    weight = dequantize(packed, scale, zero, bits=bits, group=group, length=input.shape[-1])
    return F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
