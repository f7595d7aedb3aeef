"""A linear layer on 8-bit integers: a scale for each token, found when it runs, and one for each channel.

    codes = round(input / token_scale)
    ((codes @ (packed - 128)^T) * token_scale) * scale + bias

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.1 (vector-wise quantisation).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.graph.ops.base import Operands, Sample, hint, op
from effopt.graph.packing import pack
from effopt.graph.round_to_nearest import round_to_nearest

_EXACT_TERMS = 1024
"""Products of codes, at most 127 * 128 each, whose sum float32 holds exactly: 2**24 / 16256 = 1032."""


def _fake(input: Tensor, packed: Tensor, *_: Any, **__: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], packed.shape[0]))


def _flops(operands: Operands, result: Any) -> float:
    return 2.0 * hint(result.numel()) * hint(operands["input"].shape[-1])


def _reference_bytes(operands: Operands, _: Any) -> float:
    """The weight in float32, written and read."""
    return 8.0 * hint(operands["packed"].shape[0]) * hint(operands["input"].shape[-1])


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for *rows, k, n in ((1, 1, 1), (2, 3, 63, 100), (1, 100, 63), (5, 128, 32), (0, 8, 4), (3, 2100, 17)):
        x = torch.randn(*rows, k, dtype=dtype, device=device)
        x[..., :1, :] *= 0 if k == 63 else 30
        codes, scale, _ = round_to_nearest(torch.randn(n, k, dtype=dtype, device=device), bits=8)
        bias = torch.randn(n, dtype=dtype, device=device)
        yield Sample((x, pack(codes, 8), scale, bias), {})
        yield Sample((x, pack(codes, 8), scale), {})


def quantize_tokens(input: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of each token, whole numbers in `[-127, 127]`, and its scale: both float32.

    `token_scale = max|x| * (1/127)`, a product, for a compiler may turn a division by a constant into one;
    1 for a token of zeros. Ties go to the even code. A token that holds NaN or infinity has codes 0 and
    a scale that is not finite: all its results are NaN.

    Args:
        input: `[..., k]`, floating.

    Returns:
        `[..., k]` and `[..., 1]`.
    """
    x = input.to(torch.float32)
    most = x.abs().amax(-1, keepdim=True)
    token_scale = most * (1.0 / 127.0)
    token_scale = torch.where(token_scale == 0, 1.0, token_scale)
    codes = (x / token_scale).round().clamp(-127, 127)
    return torch.where(codes.isnan(), 0.0, codes), token_scale


@op(flops=_flops, samples=_samples, fake=_fake, reference_bytes=_reference_bytes)
def int8_linear(input: Tensor, packed: Tensor, scale: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """`input @ weight^T + bias` with `input` rounded to 8 bits for each token, summed in integers.

    The sum of products is exact, in int32. It is then rounded to float32, times the token's scale, times
    the channel's, plus the bias, in that order and in float32.

    Args:
        input: `[..., k]`, floating.
        packed: `[n, k]`, uint8: codes plus 128.
        scale: `[n, 1]`, floating; one for each channel.
        bias: `[n]`, or None.

    Returns:
        `[..., n]`, dtype of `input`.
    """
    codes, token_scale = quantize_tokens(input)
    weight = packed.to(torch.float32) - 128.0
    chunks = zip(codes.split(_EXACT_TERMS, -1), weight.split(_EXACT_TERMS, -1), strict=True)
    total = torch.stack([F.linear(c, w).to(torch.int32) for c, w in chunks]).sum(0, dtype=torch.int32)
    out = total.to(torch.float32) * token_scale * scale.to(torch.float32)[:, 0]
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(input.dtype)
