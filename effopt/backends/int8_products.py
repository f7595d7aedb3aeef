"""Products of 8-bit integers on a CPU, summed exactly: `torch._int_mm` on VNNI and matrix units (AMX).

The packed weight is the left operand, as it is stored: unsigned codes, row after row. So nothing is laid
out anew, the library copies the few rows of the input instead of the weight, and what the codes are
too large by is subtracted afterwards, in integers: codes @ x - zero * sum(x).

- `int-mm` is `ops.int8_linear`, to the bit.
- `int8-digits` is `ops.quantized_linear` on float32: each row of the input is split into three 8-bit digits,
  x = scale * (d0 + d1 / 254 + d2 / 254**2), whose products are exact. What is left of x is below
  2**-24 of the row's largest magnitude, as if the row were rounded to float32 once more.

Source of the splitting: Ootomo, Ozaki & Yokota 2023, arXiv:2306.11975.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from effopt.backends.base import Lowering
from effopt.backends.quantized import capabilities, cpu_refusal, rows_of
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint, tensor_bytes
from effopt.graph.ops.int8_linear import quantize_tokens
from effopt.target import Target

DIGITS, BASE = 3, 254
"""Digits of a row, and what one is worth in the next: a remainder of half a unit is at most 127 of those."""
MOST_TERMS = (2**31 - 1) // (255 * 127)
"""Products of an unsigned and a signed code that int32 sums without overflow."""
RATES = {"amx_int8": 12.0, "avx512_vnni": 2.5, "avx_vnni": 2.5}
"""Operations a second on integers, in units of the target's float32 rate, by what the processor has."""


def int_mm(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`ops.int8_linear` on integer units; arguments and every bit of the result as there."""
    codes, token_scale = quantize_tokens(input.reshape(-1, input.shape[-1]))
    rows = codes.shape[0]
    codes = codes.to(torch.int8)
    # The product is wrong for a dimension of size 1 with a stride of 0, which Inductor gives it:
    # https://github.com/pytorch/pytorch/issues/195066
    if not statically_known_true(rows > 1):
        codes = F.pad(codes, (0, 0, 0, 1))
    total = _product(packed, codes, None)[:rows]
    out = total.to(torch.float32) * token_scale * scale.to(torch.float32)[:, 0]
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(input.dtype).reshape(*input.shape[:-1], packed.shape[0])


def int8_digits(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """`ops.quantized_linear` of float32 and 8-bit weights, one scale a row, on integer units.

    A row of the input that holds NaN or infinity gives NaN for all its results.
    """
    rows = input.reshape(-1, input.shape[-1]).to(torch.float32)
    digits, token_scale = _split(rows)
    high, middle, low = _product(packed, torch.cat(digits), zero).to(torch.float32).chunk(DIGITS)
    total = high + (middle + low * (1.0 / BASE)) * (1.0 / BASE)
    out = total * token_scale * scale.to(torch.float32)[:, 0]
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(input.dtype).reshape(*input.shape[:-1], packed.shape[0])


def _split(rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """`[m, k]` as DIGITS tensors of int8 in [-127, 127], and the scale `[m, 1]` of the first."""
    token_scale = rows.abs().amax(-1, keepdim=True) * (1.0 / 127.0)
    token_scale = torch.where(token_scale == 0, 1.0, token_scale)
    left, digits = rows / token_scale, []
    for _ in range(DIGITS):
        digit = left.round().clamp(-127, 127)
        digits.append(torch.where(digit.isnan(), 0.0, digit).to(torch.int8))
        left = (left - digit) * BASE
    return digits, token_scale


def _product(packed: Tensor, codes: Tensor, zero: Tensor | None) -> Tensor:
    """`codes @ (packed - zero)^T` in int32: `[m, k]`, `[n, k]` -> `[m, n]`; 128 for `zero` None."""
    sums = codes.sum(-1, keepdim=True, dtype=torch.int32)
    offset = 128 if zero is None else zero[:, 0].to(torch.int32)
    return torch._int_mm(packed.contiguous(), codes.t()).t() - sums * offset


@cache
def inexact() -> str | None:
    """Why `torch._int_mm` does not sum products of 8-bit integers exactly here, or None.

    Without VNNI the library adds pairs of products in 16 bits, which saturate, and says nothing:
    https://github.com/pytorch/pytorch/issues/136746. So it is asked for the largest products there are.
    """
    with unset_fake_temporarily():
        return _probe()


def _probe() -> str | None:
    for m in (2, 33):
        codes = torch.full((m, 64), 127, dtype=torch.int8)
        codes[1] = -127
        weight = torch.full((48, 64), 255, dtype=torch.uint8)
        try:
            total = torch._int_mm(weight, codes.t())
        except RuntimeError as error:
            return f"torch._int_mm does not take unsigned codes in this PyTorch: {str(error).splitlines()[0]}"
        if not torch.equal(total, weight.to(torch.int32) @ codes.t().to(torch.int32)):
            return "torch._int_mm saturates on this processor, which lacks VNNI: its sums are not exact"
    return None


def _rate() -> float:
    """Integer operations a second, in units of the target's float32 rate."""
    has = capabilities()
    return next((rate for name, rate in RATES.items() if has.get(name)), 1.0)


def _supports_int_mm(target: Target, operands: Operands) -> str | None:
    packed = operands["packed"]
    reason = cpu_refusal(target, operands)
    if reason is not None:
        return reason
    if operands["input"].dtype == torch.float64:
        return "input is float64, and the sums are scaled in float32"
    n, k = packed.shape
    if min(n, k) < 2 or k > MOST_TERMS:
        return f"the weight is [{n}, {k}]; torch._int_mm is exact from 2 rows and 2 to {MOST_TERMS} columns"
    return inexact()


def _supports_digits(target: Target, operands: Operands) -> str | None:
    dtype, group, k = operands["input"].dtype, operands["group"], operands["input"].shape[-1]
    if operands["bits"] != 8:
        return f"codes of {operands['bits']} bits; integer products are of whole bytes"
    if operands["scale"].shape[-1] != 1:
        return f"groups of {group} along {k} columns; a sum of integers has one scale"
    if operands["scale"].dtype == torch.float64:
        return "the scales are float64, and the sums are scaled in float32"
    if dtype != torch.float32:
        return f"input is {dtype}: the library's product on it is as fast as one of the three on integers"
    return _supports_int_mm(target, operands)


def _cost(digits: int, target: Target, operands: Operands, result: Any) -> float:
    """The weight at a third of the bandwidth, the operations, and int32 sums, written and read."""
    rows, (n, k) = hint(rows_of(operands["input"])) * digits, operands["packed"].shape
    moved = 3.0 * tensor_bytes(operands["packed"]) + 8.0 * rows * n + 12.0 * rows * k
    seconds: float = moved / target.bytes_per_s + 2.0 * rows * n * k / (_rate() * target.flops_per_s)
    return seconds


def _cost_int_mm(target: Target, operands: Operands, result: Any) -> float:
    return _cost(1, target, operands, result)


def _cost_digits(target: Target, operands: Operands, result: Any) -> float:
    return _cost(DIGITS, target, operands, result)


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(ops.int8_linear, "int-mm", int_mm, _supports_int_mm, _cost_int_mm, differentiable=False),
    Lowering(
        ops.quantized_linear,
        "int8-digits",
        int8_digits,
        _supports_digits,
        _cost_digits,
        differentiable=False,
    ),
)
