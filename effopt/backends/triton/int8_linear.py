"""Linear layer on 8-bit integers: a kernel that quantises tokens, and one that multiplies. Inference only.

The first gives each row of the input its scale and codes, in two walks over the row. The second multiplies
codes on the integer matrix units, sums in int32, and scales in float32 in the order of `ops.int8_linear`,
without fused multiply-adds: every bit is the reference's.

The weight is laid out once as signed codes: matrix units take their right operand from shared memory as it
was loaded, where subtracting 128 first would pass it through registers.

Few rows make few tiles, so k is divided among several programs, whose int32 sums are added afterwards.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.1; not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.backends.triton.quantized_linear import MatrixTile, matrix_cost
from effopt.backends.triton.rows import as_rows, check_floating, launch, refusal
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.target import Target

BLOCK, WARPS = 1024, 4
"""Elements of a row that the quantising kernel takes in a step: eight a thread."""
MOST_TERMS = (2**31 - 1) // (128 * 128)
"""Products of codes that int32 sums without overflow."""


def tile_for(rows: int) -> MatrixTile:
    """Sixteen rows are the least that matrix units take."""
    return MatrixTile(16, 64, 128) if rows <= 16 else MatrixTile(64, 64, 64)


@triton.jit
def quantize_tokens_kernel(
    p_x, p_codes, p_token_scale, k, x_stride, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    o_step = tl.arange(0, BLOCK)
    b_most = tl.zeros([BLOCK], dtype=tl.float32)
    b_nan = tl.zeros([BLOCK], dtype=tl.int32)
    for i_step in range(STEPS):
        o_k = i_step * BLOCK + o_step
        b_x = tl.load(p_x + i_row * x_stride + o_k, mask=o_k < k, other=0.0).to(tl.float32)
        b_most = tl.maximum(b_most, tl.abs(b_x))
        b_nan = b_nan | (b_x != b_x).to(tl.int32)
    b_scale = tl.max(b_most, axis=0) * (1.0 / 127.0)
    b_scale = tl.where(b_scale == 0.0, 1.0, b_scale)
    b_scale = tl.where(tl.max(b_nan, axis=0) > 0, float("nan"), b_scale)
    tl.store(p_token_scale + i_row, b_scale)
    for i_step in range(STEPS):
        o_k = i_step * BLOCK + o_step
        b_x = tl.load(p_x + i_row * x_stride + o_k, mask=o_k < k, other=0.0).to(tl.float32)
        b_codes = tl.div_rn(b_x, b_scale + tl.zeros_like(b_x))
        b_codes = tl.minimum(tl.maximum(tl.where(b_codes == b_codes, b_codes, 0.0), -128.0), 128.0)
        # At 1.5 * 2**23 float32 holds whole numbers only, so the sum is rounded to one, half to even.
        b_codes = (b_codes + 12582912.0) - 12582912.0
        b_codes = tl.minimum(tl.maximum(b_codes, -127.0), 127.0)
        tl.store(p_codes + i_row * k + o_k, b_codes.to(tl.int8), mask=o_k < k)


@triton.jit
def int8_linear_kernel(
    p_codes, p_signed, p_token_scale, p_scale, p_bias, p_out, rows, n, k,
    PARTS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    n_tiles, m_tiles = tl.cdiv(n, COLUMNS), tl.cdiv(rows, ROWS)
    i_n = tl.program_id(0) % n_tiles
    i_m = (tl.program_id(0) // n_tiles) % m_tiles
    i_split = tl.program_id(0) // (n_tiles * m_tiles)
    o_row = i_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = i_n.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_row, m_n = o_row < rows, o_n < n
    b_sum = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    for i_step in range(STEPS):
        o_k = (i_split * STEPS + i_step) * DEPTH + tl.arange(0, DEPTH)
        m_k = (o_k < k)[None, :]
        b_codes = tl.load(p_codes + o_row[:, None] * k + o_k[None, :], mask=m_row[:, None] & m_k, other=0)
        b_weight = tl.load(p_signed + o_n[:, None] * k + o_k[None, :], mask=m_n[:, None] & m_k, other=0)
        b_sum = tl.dot(b_codes, tl.trans(b_weight), b_sum, out_dtype=tl.int32)
    p_tile = p_out + (i_split.to(tl.int64) * rows + o_row[:, None]) * n + o_n[None, :]
    m_tile = m_row[:, None] & m_n[None, :]
    if PARTS > 1:
        tl.store(p_tile, b_sum, mask=m_tile)
    else:
        b_token = tl.load(p_token_scale + o_row, mask=m_row, other=0.0)[:, None]
        b_scale = tl.load(p_scale + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_out = b_sum.to(tl.float32) * b_token * b_scale
        if p_bias is not None:
            b_out = b_out + tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_tile)


def signed(packed: Tensor) -> Tensor:
    """The layout of the weight that the kernel reads: codes less 128, int8 `[n, k]`."""
    return packed.contiguous().bitwise_xor(128).view(torch.int8)


def _shape_refusal(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the operands do not fit together, or None."""
    if input.dtype == torch.float64 or scale.dtype == torch.float64:
        return "float64, and the kernel wants narrower operands, for it scales in float32"
    if input.dim() == 0 or packed.dim() != 2:
        got = f"{list(input.shape)} and {list(packed.shape)}"
        return f"input and packed are {got}, and the kernel wants [..., k] and [n, k]"
    n, k = packed.shape
    if not all(isinstance(size, int) for size in (n, k)):
        return f"the weight is [{n}, {k}], a symbol among them, and the kernel wants numbers to cut tiles of"
    if input.shape[-1] != k or k > MOST_TERMS:
        return f"input is {list(input.shape)}, and the kernel wants {k} in a row, at most {MOST_TERMS}"
    for name, tensor, shape in (("scale", scale, [n, 1]), ("bias", bias, [n])):
        if tensor is not None and list(tensor.shape) != shape:
            return f"{name} is {list(tensor.shape)}, and the kernel wants {shape}"
    return None


@torch.library.custom_op(
    "effopt_triton::int8_linear",
    mutates_args=(),
    schema="(Tensor input, Tensor packed, Tensor scale, Tensor? bias) -> Tensor",
)
def _int8_linear(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check_floating(input=input, scale=scale, bias=bias)
    reason = _shape_refusal(input, packed, scale, bias)
    if reason is not None:
        raise ValueError(reason)
    if packed.dtype != torch.int8:
        raise TypeError(f"packed: expected torch.int8, the layout of `signed`, got {packed.dtype}")
    n, k = packed.shape
    out = input.new_empty((*input.shape[:-1], n))
    if out.numel() == 0 or k == 0:
        return out.zero_() + (0 if bias is None else bias.to(input.dtype))
    codes, token_scale = _quantize_tokens(as_rows(input))
    rows, tile = codes.shape[0], tile_for(codes.shape[0])
    splits = tile.splits(rows, n, k)
    sums = out if splits == 1 else out.new_empty((splits, rows, n), dtype=torch.int32)
    launch(
        int8_linear_kernel,
        splits * tile.programs(rows, n),
        codes,
        *(codes, packed.contiguous(), token_scale, scale.contiguous()),
        None if bias is None else bias.contiguous(),
        sums,
        *(rows, n, k),
        PARTS=splits,
        STEPS=tile.steps(k, splits),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )
    return out if splits == 1 else _scale_parts(sums, token_scale, scale, bias, out)


def _quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.quantize_tokens` of rows: int8 `[rows, k]` and float32 `[rows]`."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    token_scale = x.new_empty(x.shape[0], dtype=torch.float32)
    launch(
        quantize_tokens_kernel,
        x.shape[0],
        x,
        *(x, codes, token_scale, x.shape[1], x.stride(0)),
        STEPS=triton.cdiv(x.shape[1], BLOCK),
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return codes, token_scale


def _scale_parts(
    sums: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    total = sums.sum(0, dtype=torch.int32).to(torch.float32) * token_scale[:, None]
    total = total * scale.to(torch.float32)[:, 0]
    if bias is not None:
        total = total + bias.to(torch.float32)
    return out.copy_(total.view(out.shape))


@_int8_linear.register_fake
def _(input: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return ops.int8_linear.fake(input, packed)


def int8_linear(input: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`effopt::int8_linear` by two kernels, `packed` laid out by `signed`. Input may have any strides."""
    return _int8_linear(input, packed, scale, bias)


def _supports(target: Target, operands: Operands) -> str | None:
    named = {name: operands[name] for name in ("input", "scale", "bias")}
    return refusal(target, named) or _shape_refusal(**operands)


INT8_LINEAR = Lowering(
    ops.int8_linear,
    "triton",
    int8_linear,
    _supports,
    matrix_cost(ops.int8_linear, share=0.8),
    differentiable=False,
    prepack={"packed": signed},
)
