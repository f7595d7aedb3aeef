"""RMSNorm, alone and after a residual addition, forward and backward.

Forward: a program holds whole rows in registers, sums their squares and scales them. Reads x (and the
residual) once, writes the result (and the total) once: 2 (4) tensors of [rows, d].
Backward: recomputes the root mean square from the row, which it reads anyway, so nothing but x is
saved. With n = x * r, w' = weight + offset, g the incoming gradient and mean over the row:

    dx = r * (g w' - n * mean(g w' n)),      dweight = sum over rows of g n

Each program walks over tiles of rows and writes one partial dweight; PyTorch sums the partials in a
fixed order, so there are no atomics and the bits repeat. Moves 3 (4 with a gradient of the total)
tensors of [rows, d], and the partials.

Source: Zhang & Sennrich 2019, arXiv:1910.07467, equation 4; the gradient is its derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.backends.triton.rows import (
    as_rows,
    check_floating,
    check_row,
    elementwise_strides,
    launch,
    norm_outputs,
    norm_refusal,
    partial_programs,
    restride,
    roofline,
    row_stride,
    tile_for,
)
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.target import Target


@triton.jit
def scale_block(p_weight, o_col, m_col, OFFSET: tl.constexpr, ROUND_TO: tl.constexpr, ACC: tl.constexpr):
    """`weight + OFFSET` as `[1, COLUMNS]`; rounded where the reference rounds, if ROUND_TO is a dtype."""
    b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(ACC)
    if ROUND_TO is not None:
        b_weight = b_weight.to(ROUND_TO).to(ACC)
    if OFFSET != 0.0:
        b_weight += OFFSET
        if ROUND_TO is not None:
            b_weight = b_weight.to(ROUND_TO).to(ACC)
    return b_weight


@triton.jit
def rms_norm_kernel(
    p_x, p_residual, p_weight, p_out, p_total, n_rows, d, x_stride, residual_stride,
    EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    ROUND_TO: tl.constexpr = DTYPE if ROUND_FIRST else None
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_col = tl.arange(0, COLUMNS)[None, :]
    m_col = o_col < d
    m_tile = (o_row < n_rows) & m_col
    b_x = tl.load(p_x + o_row * x_stride + o_col, mask=m_tile, other=0.0).to(ACC)
    if p_residual is not None:
        b_x += tl.load(p_residual + o_row * residual_stride + o_col, mask=m_tile, other=0.0).to(ACC)
        b_total = b_x.to(DTYPE)
        tl.store(p_total + o_row * d + o_col, b_total, mask=m_tile)
        b_x = b_total.to(ACC)
    b_out = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=1) / d + EPS)[:, None]
    if ROUND_FIRST:
        b_out = b_out.to(DTYPE).to(ACC)
    if p_weight is not None:
        b_out *= scale_block(p_weight, o_col, m_col, OFFSET, ROUND_TO, ACC)
    tl.store(p_out + o_row * d + o_col, b_out.to(DTYPE), mask=m_tile)


@triton.jit
def rms_norm_backward_kernel(
    p_grad, p_grad_total, p_x, p_weight, p_dx, p_dweight, n_rows, d, grad_stride, grad_total_stride,
    x_stride,
    EPS: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    ROUND_TO: tl.constexpr = DTYPE if ROUND_FIRST else None
    i_program = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, COLUMNS)[None, :]
    m_col = o_col < d
    b_dweight = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    # Not `for ... in range`: the interpreter of Triton 3.6 cannot turn its bounds to int under NumPy 2.4.
    i_tile = i_program
    while i_tile * ROWS < n_rows:
        o_row = i_tile * ROWS + tl.arange(0, ROWS)[:, None]
        m_tile = (o_row < n_rows) & m_col
        b_x = tl.load(p_x + o_row * x_stride + o_col, mask=m_tile, other=0.0).to(ACC)
        b_grad = tl.load(p_grad + o_row * grad_stride + o_col, mask=m_tile, other=0.0).to(ACC)
        b_rms = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / d + EPS)[:, None]
        b_normed = b_x * b_rms
        if p_dweight is not None:
            b_dweight += b_grad * (b_normed.to(DTYPE).to(ACC) if ROUND_FIRST else b_normed)
        if p_weight is not None:
            b_grad *= scale_block(p_weight, o_col, m_col, OFFSET, ROUND_TO, ACC)
        b_along = (tl.sum(b_grad * b_normed, axis=1) / d)[:, None]
        b_dx = b_rms * (b_grad - b_normed * b_along)
        if p_grad_total is not None:
            p_tile = p_grad_total + o_row * grad_total_stride + o_col
            b_dx += tl.load(p_tile, mask=m_tile, other=0.0).to(ACC)
        tl.store(p_dx + o_row * d + o_col, b_dx.to(DTYPE), mask=m_tile)
        i_tile += tl.num_programs(0)
    if p_dweight is not None:
        o_partial = i_program * d + o_col
        tl.store(p_dweight + o_partial, tl.sum(b_dweight, axis=0)[None, :], mask=m_col)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Check, allocate, launch. Returns contiguous (normalised, total or None)."""
    check_floating(x=x, residual=residual, weight=weight)
    check_row(x, weight=weight)
    out, total, residual = norm_outputs(x, residual)
    if x.numel() == 0:
        return out, total
    rows, tile = as_rows(x), tile_for(x.shape[-1])
    launch(
        rms_norm_kernel,
        triton.cdiv(rows.shape[0], tile.rows),
        x,
        *(rows, residual, None if weight is None else weight.contiguous(), out, total),
        *rows.shape,
        *(row_stride(t) for t in (rows, residual)),
        EPS=eps,
        OFFSET=offset,
        ROUND_FIRST=round_first,
        **tile.options(x.dtype),
    )
    return out, total


@torch.library.custom_op(
    "effopt_triton::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, float eps, float offset, bool round_first) -> Tensor",
)
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> Tensor:
    return _forward(x, None, weight, eps, offset, round_first)[0]


@torch.library.custom_op(
    "effopt_triton::add_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool round_first) "
    "-> (Tensor, Tensor)",
)
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    out, total = _forward(x, residual, weight, eps, offset, round_first)
    assert total is not None
    return out, restride(total, elementwise_strides(x, residual))


@torch.library.custom_op(
    "effopt_triton::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, float eps, float offset, "
    "bool round_first, bool want_dweight) -> (Tensor, Tensor)",
)
def _rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, weight). dweight is empty if it is not wanted."""
    check_floating(grad=grad, grad_total=grad_total, x=x, weight=weight)
    check_row(x, weight=weight)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return dx, _no_dweight(x, weight, want_dweight)
    rows, grad, tile = as_rows(x), as_rows(grad), tile_for(x.shape[-1], backward=True)
    grad_total = None if grad_total is None else as_rows(grad_total)
    programs = partial_programs(tile, rows.shape[0])
    accumulate = torch.promote_types(x.dtype, torch.float32)
    partial = x.new_empty((programs, x.shape[-1]), dtype=accumulate) if want_dweight else None
    launch(
        rms_norm_backward_kernel,
        programs,
        x,
        *(grad, grad_total, rows, None if weight is None else weight.contiguous(), dx, partial),
        *rows.shape,
        *(row_stride(t) for t in (grad, grad_total, rows)),
        EPS=eps,
        OFFSET=offset,
        ROUND_FIRST=round_first,
        **tile.options(x.dtype),
    )
    if partial is None or weight is None:
        return dx, _no_dweight(x, weight, False)
    return dx, partial.sum(0).to(weight.dtype)


def _no_dweight(x: Tensor, weight: Tensor | None, want_dweight: bool) -> Tensor:
    return torch.zeros_like(weight) if want_dweight and weight is not None else x.new_zeros(0)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, *_: Any) -> Tensor:
    return ops.rms_norm.fake(x, weight)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return ops.add_rms_norm.fake(x, residual)


@_rms_norm_backward.register_fake
def _(grad: Tensor, grad_total: Any, x: Tensor, weight: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _no_dweight(x, weight, rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the tensor that was normalised: x, or the total of x and the residual."""
    *_, weight, ctx.eps, ctx.offset, ctx.round_first = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if isinstance(output, tuple) else inputs[0], weight)


def _differentiate(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Any, Any]:
    x, weight = ctx.saved_tensors
    if grad is None:
        return grad_total, None
    want = weight is not None and ctx.needs_input_grad[-4]
    options = (ctx.eps, ctx.offset, ctx.round_first, want)
    dx, dweight = _rms_norm_backward(grad, grad_total, x, weight, *options)
    return dx, dweight if want else None


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    return (*_differentiate(ctx, grad, None), None, None, None)


def _add_backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Any, ...]:
    dx, dweight = _differentiate(ctx, grad, grad_total)
    return dx, dx, dweight, None, None, None


_rms_norm.register_autograd(_backward, setup_context=_save)
_add_rms_norm.register_autograd(_add_backward, setup_context=_save)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, weight_offset: float = 0.0, round_first: bool = False
) -> Tensor:
    """`effopt::rms_norm` by one kernel. Shapes and dtypes as there; x may have any strides."""
    return _rms_norm(x, weight, eps, weight_offset, round_first)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    round_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """`effopt::add_rms_norm` by one kernel. Returns (normalised, total); total has x + residual's strides."""
    return _add_rms_norm(x, residual, weight, eps, weight_offset, round_first)


def _supports(target: Target, operands: Operands) -> str | None:
    return norm_refusal(target, operands["x"], operands.get("residual"), weight=operands["weight"])


RMS_NORM = Lowering(ops.rms_norm, "triton", rms_norm, _supports, roofline(ops.rms_norm))
ADD_RMS_NORM = Lowering(ops.add_rms_norm, "triton", add_rms_norm, _supports, roofline(ops.add_rms_norm))
