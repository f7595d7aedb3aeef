"""Linear layer on weights of 4 or 8 bits, dequantised in registers. Inference only.

A program computes a tile of the output over a part of k: it loads packed bytes, makes weights of them in
float32, rounds those to the dtype of the input and multiplies on matrix units, summing in float32. So the
weight is read once in its packed form for each tile of rows, and never written.

With 4-bit codes a byte holds two neighbours along k. The input's tile is split into its even and odd
columns in registers, and each half is multiplied with the codes of one nibble: nothing is interleaved.

Few rows make few tiles, so k is divided among several programs. Each writes its sums to a place of its own,
and they are added in a fixed order: no atomics, and the bits repeat.

Source: Frantar et al. 2024, arXiv:2408.11743 (weights of few bits at batch sizes of tens); not measured on a
GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.backends.triton.rows import LAUNCH_S, as_rows, check_floating, launch, multiplied_in, refusal
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.graph.packing import packed_length
from effopt.graph.round_to_nearest import group_count
from effopt.target import Target

BITS = (4, 8)
PROGRAMS = 256
"""Programs that k is divided for: about two for each multiprocessor of an sm_90. A constant, not of the
device, so that the order of summation is the same everywhere."""
LEAST_STEPS = 4
"""Tiles of k that a program walks at least, so that its loads overlap."""


@dataclass(frozen=True)
class MatrixTile:
    """Output rows and columns of a program, and columns of the input that one step takes."""

    rows: int
    columns: int
    depth: int
    warps: int = 4

    def programs(self, rows: int, n: int) -> int:
        """Tiles that cover `[rows, n]`."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(n, self.columns)

    def splits(self, rows: int, n: int, k: int) -> int:
        """Parts that k is divided into."""
        most = max(1, triton.cdiv(k, self.depth) // LEAST_STEPS)
        return min(most, max(1, PROGRAMS // self.programs(rows, n)))

    def steps(self, k: int, splits: int) -> int:
        """Steps of a program, the same for each part."""
        return triton.cdiv(triton.cdiv(k, self.depth), splits)


def tile_for(rows: int, dtype: torch.dtype) -> MatrixTile:
    """Sixteen rows are the least that matrix units take. float32 is summed without them, all operands of a
    step in registers: at 64 x 64 x 32 it spills 380 bytes a thread on sm_90, at 32 x 32 x 32 nothing.
    """
    if dtype == torch.float32:
        return MatrixTile(16 if rows <= 16 else 32, 32, 32)
    return MatrixTile(16 if rows <= 16 else 64, 64, 64)


@triton.jit
def dequantize_block(
    b_codes, o_code, p_scale, p_zero, o_n, m_n, i_group, k, groups, group,
    ALIGNED: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Codes `[n, depth]` as weights. ALIGNED: the tile lies in group `i_group`; else each column is asked."""
    if ALIGNED:
        o_scale = (o_n * groups + i_group)[:, None]
        m_scale = m_n[:, None]
    else:
        o_scale = o_n[:, None] * groups + (o_code // group)[None, :]
        m_scale = m_n[:, None] & (o_code < k)[None, :]
    b_weight = b_codes.to(tl.float32)
    if p_zero is None:
        b_weight -= OFFSET
    else:
        b_weight -= tl.load(p_zero + o_scale, mask=m_scale, other=0).to(tl.float32)
    b_weight *= tl.load(p_scale + o_scale, mask=m_scale, other=0.0).to(tl.float32)
    return b_weight.to(DTYPE).to(DOT)


@triton.jit
def quantized_linear_kernel(
    p_x, p_packed, p_scale, p_zero, p_bias, p_out, rows, n, k, row_bytes, groups, group, x_stride,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = DEPTH // PER_BYTE
    OFFSET: tl.constexpr = 2.0 ** (BITS - 1)
    n_tiles, m_tiles = tl.cdiv(n, COLUMNS), tl.cdiv(rows, ROWS)
    i_n = tl.program_id(0) % n_tiles
    i_m = (tl.program_id(0) // n_tiles) % m_tiles
    i_split = tl.program_id(0) // (n_tiles * m_tiles)
    o_row = i_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = i_n.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_row, m_n = o_row < rows, o_n < n
    b_sum = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i_step in range(STEPS):
        i_k = (i_split * STEPS + i_step) * DEPTH
        o_k = i_k + tl.arange(0, DEPTH)
        o_byte = i_k // PER_BYTE + tl.arange(0, BYTES)
        m_x = m_row[:, None] & (o_k < k)[None, :]
        b_x = tl.load(p_x + o_row[:, None] * x_stride + o_k[None, :], mask=m_x, other=0.0).to(DOT)
        m_packed = m_n[:, None] & (o_byte < row_bytes)[None, :]
        b_packed = tl.load(p_packed + o_n[:, None] * row_bytes + o_byte[None, :], mask=m_packed, other=0)
        # The last steps of the last part may lie beyond k: there x is 0, and the scale must be a number.
        i_group = tl.minimum(i_k // group, groups - 1)
        if BITS == 8:
            b_weight = dequantize_block(
                b_packed, o_k, p_scale, p_zero, o_n, m_n, i_group, k, groups, group,
                ALIGNED, OFFSET, DTYPE, DOT,
            )  # fmt: skip
            b_sum = tl.dot(b_x, tl.trans(b_weight), b_sum, input_precision="ieee")
        else:
            b_even, b_odd = tl.split(tl.reshape(b_x, (ROWS, BYTES, 2)))
            b_low = dequantize_block(
                b_packed & 15, 2 * o_byte, p_scale, p_zero, o_n, m_n, i_group, k, groups, group,
                ALIGNED, OFFSET, DTYPE, DOT,
            )  # fmt: skip
            b_sum = tl.dot(b_even, tl.trans(b_low), b_sum, input_precision="ieee")
            b_high = dequantize_block(
                b_packed >> 4, 2 * o_byte + 1, p_scale, p_zero, o_n, m_n, i_group, k, groups, group,
                ALIGNED, OFFSET, DTYPE, DOT,
            )  # fmt: skip
            b_sum = tl.dot(b_odd, tl.trans(b_high), b_sum, input_precision="ieee")
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_tile = p_out + (i_split.to(tl.int64) * rows + o_row[:, None]) * n + o_n[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])


def _check(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> None:
    check_floating(input=input, scale=scale, bias=bias)
    reason = _shape_refusal(input, packed, scale, zero, bias, bits, group)
    if reason is not None:
        raise ValueError(reason)


def _shape_refusal(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> str | None:
    """Why the operands do not fit together, or None."""
    if bits not in BITS:
        return f"codes of {bits} bits; the kernel wants {BITS[0]} or {BITS[1]}"
    if input.dtype == torch.float64 or scale.dtype == torch.float64:
        return "float64, and the kernel wants narrower operands, for it sums in float32"
    if input.dim() == 0 or packed.dim() != 2:
        got = f"{list(input.shape)} and {list(packed.shape)}"
        return f"input and packed are {got}, and the kernel wants [..., k] and [n, k]"
    n, k = packed.shape[0], input.shape[-1]
    if not all(isinstance(size, int) for size in (*packed.shape, k)):
        return f"the weight is [{n}, {k}], a symbol among them, and the kernel wants numbers to cut tiles of"
    groups = group_count(k, group)
    wanted = {"packed": (packed, [n, packed_length(k, bits)]), "scale": (scale, [n, groups])}
    wanted |= {} if zero is None else {"zero": (zero, [n, groups])}
    wanted |= {} if bias is None else {"bias": (bias, [n])}
    for name, (tensor, shape) in wanted.items():
        if list(tensor.shape) != shape:
            return f"{name} is {list(tensor.shape)}, and the kernel wants {shape}"
    for name, codes in (("packed", packed), ("zero", zero)):
        if codes is not None and codes.dtype != torch.uint8:
            return f"{name} is {codes.dtype}, and the kernel wants torch.uint8"
    return None


@torch.library.custom_op(
    "effopt_triton::quantized_linear",
    mutates_args=(),
    schema="(Tensor input, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group) "
    "-> Tensor",
)
def _quantized_linear(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    _check(input, packed, scale, zero, bias, bits, group)
    n, k = packed.shape[0], input.shape[-1]
    out = input.new_empty((*input.shape[:-1], n))
    if out.numel() == 0 or k == 0:
        return out.zero_() + (0 if bias is None else bias.to(input.dtype))
    x = as_rows(input)
    rows, groups = x.shape[0], scale.shape[1]
    group = group if groups > 1 else k
    tile = tile_for(rows, input.dtype)
    splits = tile.splits(rows, n, k)
    sums = out if splits == 1 else out.new_empty((splits, rows, n), dtype=torch.float32)
    launch(
        quantized_linear_kernel,
        splits * tile.programs(rows, n),
        x,
        *(x, packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()),
        bias.contiguous() if splits == 1 and bias is not None else None,
        sums,
        *(rows, n, k, packed.shape[1], groups, group, x.stride(0)),
        BITS=bits,
        ALIGNED=groups == 1 or group % tile.depth == 0,
        STEPS=tile.steps(k, splits),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        DOT=multiplied_in(x),
        num_warps=tile.warps,
    )
    return out if splits == 1 else _add_parts(sums, bias, out)


def _add_parts(sums: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    total = sums.sum(0)
    if bias is not None:
        total += bias.to(torch.float32)
    return out.copy_(total.view(out.shape))


@_quantized_linear.register_fake
def _(input: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return ops.quantized_linear.fake(input, packed)


def quantized_linear(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """`effopt::quantized_linear` by one kernel. Shapes and dtypes as there; input may have any strides."""
    return _quantized_linear(input, packed, scale, zero, bias, bits, group)


def _supports(target: Target, operands: Operands) -> str | None:
    named = {name: operands[name] for name in ("input", "scale", "bias")}
    return refusal(target, named) or _shape_refusal(**operands)


def matrix_cost(op: Any, share: float) -> Any:
    """The cost of a kernel that reaches `share` of the target's matrix rate, or moves each byte once."""

    def cost(target: Target, operands: Operands, result: Any) -> float:
        moved = op.bytes_moved(operands, result) / target.bytes_per_s
        return float(max(moved, op.flops(operands, result) / (share * target.flops_per_s))) + LAUNCH_S

    return cost


QUANTIZED_LINEAR = Lowering(
    ops.quantized_linear,
    "triton",
    quantized_linear,
    _supports,
    matrix_cost(ops.quantized_linear, share=0.4),
    differentiable=False,
)
