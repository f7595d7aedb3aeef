"""Layer norm of the last dimension, alone and after a residual addition, forward and backward.

Forward: a program holds whole rows in registers, takes the mean, then the variance of what is left
(two passes over registers, not the difference of two sums, which cancels). Reads x (and the residual)
once, writes the result (and the total) once: 2 (4) tensors of [rows, d].
Backward: recomputes mean and variance from the row, which it reads anyway, so nothing but x is saved.
With n = (x - mean) * r, g the incoming gradient and mean over the row:

    dx = r * (g w - mean(g w) - n * mean(g w n)),   dweight = sum of g n,   dbias = sum of g   over rows

Each program walks over tiles of rows and writes one partial dweight and dbias; PyTorch sums the
partials in a fixed order, so there are no atomics and the bits repeat. Moves 3 (4 with a gradient of
the total) tensors of [rows, d], and the partials.

Source: Ba et al. 2016, arXiv:1607.06450, equation 4; the gradient is its derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
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
def centre_block(b_x, m_tile, d, EPS: tl.constexpr, ACC: tl.constexpr):
    """The rows minus their mean (0 where masked), and 1 / their standard deviation as a column."""
    b_mean = (tl.sum(b_x, axis=1) / d)[:, None]
    b_centred = tl.where(m_tile, b_x - b_mean, tl.zeros_like(b_x))
    return b_centred, tl.rsqrt(tl.sum(b_centred * b_centred, axis=1) / d + EPS)[:, None]


@triton.jit
def layer_norm_kernel(
    p_x, p_residual, p_weight, p_bias, p_out, p_total, n_rows, d, x_stride, residual_stride,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = p_x.dtype.element_ty
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
    b_centred, b_scale = centre_block(b_x, m_tile, d, EPS, ACC)
    b_out = b_centred * b_scale
    if p_weight is not None:
        b_out *= tl.load(p_weight + o_col, mask=m_col, other=0.0).to(ACC)
    if p_bias is not None:
        b_out += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(ACC)
    tl.store(p_out + o_row * d + o_col, b_out.to(DTYPE), mask=m_tile)


@triton.jit
def layer_norm_backward_kernel(
    p_grad, p_grad_total, p_x, p_weight, p_dx, p_dweight, p_dbias, n_rows, d, grad_stride,
    grad_total_stride, x_stride,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    i_program = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, COLUMNS)[None, :]
    m_col = o_col < d
    o_partial = i_program * d + o_col
    b_dweight = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    b_dbias = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    i_tile = i_program  # not a `range`: see rms_norm.py
    while i_tile * ROWS < n_rows:
        o_row = i_tile * ROWS + tl.arange(0, ROWS)[:, None]
        m_tile = (o_row < n_rows) & m_col
        b_x = tl.load(p_x + o_row * x_stride + o_col, mask=m_tile, other=0.0).to(ACC)
        b_grad = tl.load(p_grad + o_row * grad_stride + o_col, mask=m_tile, other=0.0).to(ACC)
        b_centred, b_scale = centre_block(b_x, m_tile, d, EPS, ACC)
        b_normed = b_centred * b_scale
        if p_dweight is not None:
            b_dweight += b_grad * b_normed
        if p_dbias is not None:
            b_dbias += b_grad
        if p_weight is not None:
            b_grad *= tl.load(p_weight + o_col, mask=m_col, other=0.0).to(ACC)
        b_mean = (tl.sum(b_grad, axis=1) / d)[:, None]
        b_along = (tl.sum(b_grad * b_normed, axis=1) / d)[:, None]
        b_dx = b_scale * (b_grad - b_mean - b_normed * b_along)
        if p_grad_total is not None:
            p_tile = p_grad_total + o_row * grad_total_stride + o_col
            b_dx += tl.load(p_tile, mask=m_tile, other=0.0).to(ACC)
        tl.store(p_dx + o_row * d + o_col, b_dx.to(DTYPE), mask=m_tile)
        i_tile += tl.num_programs(0)
    if p_dweight is not None:
        tl.store(p_dweight + o_partial, tl.sum(b_dweight, axis=0)[None, :], mask=m_col)
    if p_dbias is not None:
        tl.store(p_dbias + o_partial, tl.sum(b_dbias, axis=0)[None, :], mask=m_col)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Check, allocate, launch. Returns contiguous (normalised, total or None)."""
    check_floating(x=x, residual=residual, weight=weight, bias=bias)
    check_row(x, weight=weight, bias=bias)
    out, total, residual = norm_outputs(x, residual)
    if x.numel() == 0:
        return out, total
    rows, tile = as_rows(x), tile_for(x.shape[-1])
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    launch(
        layer_norm_kernel,
        triton.cdiv(rows.shape[0], tile.rows),
        x,
        *(rows, residual, weight, bias, out, total),
        *rows.shape,
        *(row_stride(t) for t in (rows, residual)),
        EPS=eps,
        **tile.options(x.dtype),
    )
    return out, total


@torch.library.custom_op(
    "effopt_triton::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _forward(x, None, weight, bias, eps)[0]


@torch.library.custom_op(
    "effopt_triton::add_layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
)
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    out, total = _forward(x, residual, weight, bias, eps)
    assert total is not None
    return out, restride(total, elementwise_strides(x, residual))


@torch.library.custom_op(
    "effopt_triton::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, float eps, "
    "bool want_dweight, bool want_dbias) -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias) in the dtype of x; those not wanted are empty."""
    check_floating(grad=grad, grad_total=grad_total, x=x, weight=weight)
    check_row(x, weight=weight)
    dx, d = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1]
    if x.numel() == 0:
        return dx, x.new_zeros(d if want_dweight else 0), x.new_zeros(d if want_dbias else 0)
    rows, grad, tile = as_rows(x), as_rows(grad), tile_for(d, backward=True)
    grad_total = None if grad_total is None else as_rows(grad_total)
    programs = partial_programs(tile, rows.shape[0])
    accumulate, wanted = torch.promote_types(x.dtype, torch.float32), (want_dweight, want_dbias)
    partials = [x.new_empty((programs, d), dtype=accumulate) if want else None for want in wanted]
    launch(
        layer_norm_backward_kernel,
        programs,
        x,
        *(grad, grad_total, rows, None if weight is None else weight.contiguous(), dx, *partials),
        *rows.shape,
        *(row_stride(t) for t in (grad, grad_total, rows)),
        EPS=eps,
        **tile.options(x.dtype),
    )
    dweight, dbias = (x.new_zeros(0) if p is None else p.sum(0).to(x.dtype) for p in partials)
    return dx, dweight, dbias


@_layer_norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm.fake(x, residual)


@_layer_norm_backward.register_fake
def _(grad: Tensor, grad_total: Any, x: Tensor, weight: Any, eps: float, *wanted: bool) -> tuple[Any, ...]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *(x.new_empty(x.shape[-1] if want else 0) for want in wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the tensor that was normalised: x, or the total of x and the residual."""
    *_, weight, _, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if isinstance(output, tuple) else inputs[0], weight)


def _differentiate(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Any, Any, Any]:
    x, weight = ctx.saved_tensors
    if grad is None:
        return grad_total, None, None
    wanted = ctx.needs_input_grad[-3:-1]
    dx, *dvectors = _layer_norm_backward(grad, grad_total, x, weight, ctx.eps, *wanted)
    dweight, dbias = (d if want else None for d, want in zip(dvectors, wanted, strict=True))
    return dx, dweight, dbias


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    return (*_differentiate(ctx, grad, None), None)


def _add_backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Any, ...]:
    dx, dweight, dbias = _differentiate(ctx, grad, grad_total)
    return dx, dx, dweight, dbias, None


_layer_norm.register_autograd(_backward, setup_context=_save)
_add_layer_norm.register_autograd(_add_backward, setup_context=_save)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """`aten::layer_norm` of the last dimension by one kernel; input may have any strides.

    Raises:
        ValueError: more than the last dimension is to be normalised.
    """
    if list(normalized_shape) != [input.shape[-1]]:
        raise ValueError(f"normalized_shape: expected [{input.shape[-1]}], got {list(normalized_shape)}")
    return _layer_norm(input, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`effopt::add_layer_norm` by one kernel: (normalised, total); total has x + residual's strides."""
    return _add_layer_norm(x, residual, weight, bias, eps)


def _supports(target: Target, operands: Operands) -> str | None:
    x = operands["input"] if "input" in operands else operands["x"]
    residual, weight, bias = (operands.get(name) for name in ("residual", "weight", "bias"))
    reason = norm_refusal(target, x, residual, weight=weight, bias=bias)
    if reason:
        return reason
    if len(operands.get("normalized_shape", (1,))) != 1:
        return f"normalises {list(operands['normalized_shape'])}, and the kernel only the last dimension"
    if any(v is not None and v.dtype != x.dtype for v in (weight, bias)):
        return f"weight or bias does not have the dtype of x, {x.dtype}"
    return None


LAYER_NORM = Lowering(ops.layer_norm, "triton", layer_norm, _supports, roofline(ops.layer_norm))
ADD_LAYER_NORM = Lowering(
    ops.add_layer_norm, "triton", add_layer_norm, _supports, roofline(ops.add_layer_norm)
)
