"""Weights kept as small integers, multiplied as floating-point numbers on a CPU.

Both lowerings read the layout of `ops.quantized_linear`, so the graphs of a model for one token and for many
hold one copy of its weights between them:

- `dequantize` makes a block of rows of the weight at a time, small enough for the caches, and multiplies it
  by the library's matrix product. It costs what a floating-point layer costs, plus the making.
- `reduce`, for few rows of the input, unpacks, scales, multiplies and adds in one loop over the packed bytes
  that Inductor writes; no weight is ever in memory as a floating-point number.

Measured on one core of an Intel Xeon with AMX, torch 2.13, by benchmarks/quantized.py; results beside it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from effopt.backends.base import Lowering
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint, tensor_bytes
from effopt.graph.round_to_nearest import dequantize as dequantized
from effopt.target import Target

BLOCK_ELEMENTS = 2**20
"""Weights made at once: 4 MiB in float32, of which the product reads most from the second-level cache."""
MOST_BLOCKS = 8
"""Each block is a call of the matrix product: a large layer has larger blocks, not a longer graph."""
MOST_ROWS = 16
"""Rows of the input that `reduce` takes: each is a sum in the one loop, and has its own code in it."""
VECTOR_BYTES = 16
"""Codes that become one vector of float32 with AVX-512."""
UNPACK_FLOPS, ROW_FLOPS = 10.0, 3.5
"""What unpacking, converting and scaling one weight takes, in operations of the target's rate; and what
`reduce` adds for each row of the input."""


def dequantize(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """`ops.quantized_linear` by the library's matrix product; the weights are the reference's to the bit.

    With several codes a byte, a row is made one place of the byte after the other, which needs no shuffle,
    and the columns of `input` are put in that order: the same products, summed in another order.
    """
    k = input.shape[-1]
    by_place = _fills_bytes(k, bits, group)
    per_byte = 8 // bits if by_place else 1
    x = input.unflatten(-1, (-1, per_byte)).transpose(-1, -2).flatten(-2) if per_byte > 1 else input
    results: list[Tensor] = []
    for rows in packed.split(max(1, BLOCK_ELEMENTS // k, -(-packed.shape[0] // MOST_BLOCKS))):
        start = sum(r.shape[-1] for r in results)
        part = slice(start, start + rows.shape[0])
        offsets = None if zero is None else zero[part]
        if by_place:
            weight = _by_place(rows, scale[part], offsets, bits)
        else:
            weight = dequantized(rows, scale[part], offsets, bits=bits, group=group, length=k)
        shift = None if bias is None else bias[part].to(input.dtype)
        results.append(F.linear(x, weight.to(input.dtype), shift))
    return torch.cat(results, -1) if len(results) > 1 else results[0]


def _fills_bytes(k: Any, bits: int, group: int) -> bool:
    """Whether every group is whole bytes, all of one length."""
    return statically_known_true(k * bits % 8 == 0) and (
        group == 0 or (statically_known_true(k % group == 0) and group * bits % 8 == 0)
    )


def _by_place(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Weights `[n, k]` of packed rows: all codes in the lowest bits of their byte, then the next.

    Put together in float32, then rounded: rounded first, Inductor takes 5.2 ms, not 3.0, for 4096 x 1024
    weights of 4 bits in bfloat16. The float32 copy is of one block.
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    groups = packed.unflatten(-1, (scale.shape[-1], -1))
    offset = 2.0 ** (bits - 1) if zero is None else zero.to(wide).unsqueeze(-1)
    factor = _in_memory(scale.to(wide)).unsqueeze(-1)
    places = [(codes.to(wide) - offset) * factor for codes in _places(groups, bits)]
    return torch.stack(places, 1).flatten(1)


def _places(packed: Tensor, bits: int) -> list[Tensor]:
    """The codes in each place of the bytes. Shifted in int32: AVX-512 has no shift of bytes."""
    if bits == 8:
        return [packed]
    wide = packed.to(torch.int32)
    return [(wide >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]


def reduce(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """`ops.quantized_linear` for few rows, in one fused loop. Products and sums are float32.

    A step of the loop takes a vector of bytes from each of several parts of the row, and adds their
    products before it adds to the sum: it does not wait for one long chain of additions.
    """
    n, groups = packed.shape[0], scale.shape[-1]
    folds = _folds(groups, packed.shape[1], bits)
    # [n, folds, groups or 1, bytes]: a group that is the whole row is folded within, several by group.
    shape = (n, folds, groups // folds, -1) if groups > 1 else (n, folds, 1, -1)
    places = [codes.to(torch.float32) for codes in _places(packed.reshape(shape), bits)]
    offset = 2.0 ** (bits - 1) if zero is None else _over(zero, shape)
    places = [codes - offset for codes in places]
    factor = _over(_in_memory(scale.to(torch.float32)), shape) if groups > 1 else None
    x = _in_memory(input.reshape(-1, *places[0].shape[1:], 8 // bits).to(torch.float32).movedim(-1, 0))
    out = torch.stack([_dot(x[:, row], places, factor) for row in range(x.shape[1])])
    if factor is None:
        out = out * scale.to(torch.float32)[:, 0]
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(input.dtype).reshape(*input.shape[:-1], n)


def _folds(groups: int, row_bytes: int, bits: int) -> int:
    """Parts of a row that one step of the loop takes: two of 4-bit codes, four of 8-bit ones."""
    counts = (4, 2, 1) if bits == 8 else (2, 1)
    least = 1 if groups > 1 else VECTOR_BYTES
    return next(c for c in counts if c == 1 or (groups if groups > 1 else row_bytes) % (c * least) == 0)


def _over(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[n, groups]` as float32 beside codes `[n, folds, groups / folds, bytes]`."""
    value = value.to(torch.float32)
    return value.reshape(*shape[:3], 1) if value.shape[-1] > 1 else value[:, :, None, None]


def _in_memory(x: Tensor) -> Tensor:
    """`x`, contiguous, as a buffer of its own, for a loop that reads it often.

    Without it Inductor gathers each element, or converts it from bfloat16, once for every weight: a loop
    over 4096 x 1024 weights takes 2 to 3.3 ms, not 0.5.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _dot(x: Tensor, places: list[Tensor], factor: Tensor | None) -> Tensor:
    """Sum of the products of one row of the input, `[places, folds, groups, bytes]`, and all weights."""
    total: Any = 0
    for fold in range(x.shape[1]):
        term = sum(x[place, fold] * codes[:, fold] for place, codes in enumerate(places))
        total = total + (term if factor is None else term * factor[:, fold])
    result: Tensor = total.sum((-1, -2))
    return result


def rows_of(input: Tensor) -> Any:
    """Rows of `[..., k]`: a number, or a symbol."""
    return math.prod(input.shape[:-1])


def cpu_refusal(target: Target, operands: Operands) -> str | None:
    """Why no lowering for CPUs takes these operands, or None."""
    if target.device_type != "cpu":
        return f"written for the caches of a CPU, and the target is {target.device_type}"
    for name in ("input", "packed"):
        if any(statically_known_true(size == 0) for size in operands[name].shape):
            return f"{name} is empty ({list(operands[name].shape)}), and there is nothing to compute"
    if not all(isinstance(size, int) for size in (*operands["packed"].shape, operands["input"].shape[-1])):
        return "the weight has a symbolic size, and the loops are cut to numbers"
    return None


def _supports_reduce(target: Target, operands: Operands) -> str | None:
    input, bits, group = operands["input"], operands["bits"], operands["group"]
    rows, k = rows_of(input), input.shape[-1]
    reason = cpu_refusal(target, operands)
    if reason is not None:
        return reason
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"input is {input.dtype}, and the sums are float32"
    if operands["scale"].dtype == torch.float64:
        return "the scales are float64, and the products float32"
    if not isinstance(rows, int):
        return f"the number of rows is symbolic ({rows}), and each row is a sum of its own"
    if rows > MOST_ROWS:
        return f"{rows} rows: beyond {MOST_ROWS} a matrix product on weights made once is faster"
    if bits not in (4, 8) or not _fills_bytes(k, bits, group):
        return f"groups of {group or k} codes of {bits} bits, {k} in a row, are not whole bytes all alike"
    return None


def _cost_reduce(target: Target, operands: Operands, result: Any) -> float:
    weights = float(operands["packed"].shape[0] * operands["input"].shape[-1])
    work = weights * (UNPACK_FLOPS + ROW_FLOPS * hint(rows_of(operands["input"])))
    return tensor_bytes(operands["packed"]) / target.bytes_per_s + work / target.flops_per_s


def gemm_flops_per_s(target: Target, dtype: torch.dtype) -> float:
    """Rate of the library's matrix product: on matrix units, bfloat16 is ten times as fast as float32."""
    has_units = dtype == torch.bfloat16 and bool(capabilities().get("amx_bf16"))
    return target.flops_per_s * (10.0 if has_units else 1.0)


def capabilities() -> dict[str, Any]:
    """What the processor has, by name; empty where PyTorch does not say."""
    ask = getattr(torch.cpu, "get_capabilities", dict)
    return dict(ask())


def _cost_dequantize(target: Target, operands: Operands, result: Any) -> float:
    """The weights are written and read once more, near enough at the bandwidth of memory."""
    input = operands["input"]
    weights = float(operands["packed"].shape[0] * input.shape[-1])
    moved = tensor_bytes(operands["packed"]) + 2.0 * weights * input.element_size()
    if operands["bits"] < 8 and input.dtype != torch.float32:
        moved += 8.0 * weights  # put together in float32, see _by_place
    product = ops.quantized_linear.flops(operands, result) / gemm_flops_per_s(target, input.dtype)
    seconds: float = moved / target.bytes_per_s + weights * UNPACK_FLOPS / target.flops_per_s + product
    return seconds


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(ops.quantized_linear, "dequantize", dequantize, cpu_refusal, _cost_dequantize),
    Lowering(ops.quantized_linear, "reduce", reduce, _supports_reduce, _cost_reduce, differentiable=False),
)
