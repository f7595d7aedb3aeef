"""Gated linear unit, `activation(gate) * up`, forward and backward for five activations.

Elementwise over blocks of a row. Gate and up are often the halves of one projection, so their rows
have a stride of their own; if both are contiguous the whole tensor is one row. Forward reads two
tensors and writes one. Backward recomputes the activation: with a = activation, reads gate, up and g,
writes

    dgate = g * up * a'(gate),     dup = g * a(gate)

Source: Shazeer 2020, arXiv:2002.05202, section 2; the exact and the tanh GELU: Hendrycks & Gimpel
2016, arXiv:1606.08415, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.backends.triton.rows import (
    alike_refusal,
    as_rows,
    check_alike,
    check_floating,
    elementwise_strides,
    launch,
    refusal,
    restride,
    roofline,
)
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.target import Target

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
BLOCK, WARPS = 1024, 4
"""Eight elements a thread: one 16-byte access of each tensor in bfloat16."""


@triton.jit
def activation_block(b_x, ACTIVATION: tl.constexpr):
    """(activation, its derivative) of a block. What the caller does not use is not computed.

    Comparisons, not `tl.maximum`, in relu: it drops NaN, and PyTorch's keeps it.
    """
    if ACTIVATION == "silu":
        b_gate = tl.sigmoid(b_x)
        return b_x * b_gate, b_gate * (1.0 + b_x * (1.0 - b_gate))
    elif ACTIVATION == "gelu":
        b_cdf = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        return b_x * b_cdf, b_cdf + b_x * 0.3989422804014327 * tl.exp(-0.5 * b_x * b_x)
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(z) = 2 sigmoid(2 z): tanh is in no language core that all targets share.
        b_gate = tl.sigmoid(b_x * (1.5957691216057308 + 0.07135481627260025 * b_x * b_x))
        b_slope = 1.5957691216057308 + 0.21406444881780073 * b_x * b_x
        return b_x * b_gate, b_gate * (1.0 + b_x * b_slope * (1.0 - b_gate))
    elif ACTIVATION == "relu":
        return tl.where(b_x < 0.0, 0.0, b_x), tl.where(b_x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "sigmoid", "unknown activation")
        b_gate = tl.sigmoid(b_x)
        return b_gate, b_gate * (1.0 - b_gate)


@triton.jit
def glu_kernel(
    p_gate,
    p_up,
    p_out,
    n,
    n_blocks,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < n
    b_gate = tl.load(p_gate + i_row * gate_stride + o_col, mask=m_col, other=0.0).to(ACC)
    b_up = tl.load(p_up + i_row * up_stride + o_col, mask=m_col, other=0.0).to(ACC)
    b_activated, _ = activation_block(b_gate, ACTIVATION)
    tl.store(p_out + i_row * n + o_col, (b_activated * b_up).to(p_out.dtype.element_ty), mask=m_col)


@triton.jit
def glu_backward_kernel(
    p_grad,
    p_gate,
    p_up,
    p_dgate,
    p_dup,
    n,
    n_blocks,
    grad_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = p_dgate.dtype.element_ty
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_col = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_col = o_col < n
    b_grad = tl.load(p_grad + i_row * grad_stride + o_col, mask=m_col, other=0.0).to(ACC)
    b_gate = tl.load(p_gate + i_row * gate_stride + o_col, mask=m_col, other=0.0).to(ACC)
    b_up = tl.load(p_up + i_row * up_stride + o_col, mask=m_col, other=0.0).to(ACC)
    b_activated, b_slope = activation_block(b_gate, ACTIVATION)
    tl.store(p_dgate + i_row * n + o_col, (b_grad * b_up * b_slope).to(DTYPE), mask=m_col)
    tl.store(p_dup + i_row * n + o_col, (b_grad * b_activated).to(DTYPE), mask=m_col)


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    check_floating(gate=gate, up=up)
    check_alike("up", up, gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], activation: str) -> None:
    """Run an elementwise kernel over same-shaped inputs, into contiguous outputs."""
    if outputs[0].numel() == 0:
        return
    if all(x.is_contiguous() for x in inputs):
        inputs = tuple(x.view(1, -1) for x in inputs)
    else:
        inputs = tuple(as_rows(x) for x in inputs)
    n_rows, n = inputs[0].shape
    n_blocks = triton.cdiv(n, BLOCK)
    launch(
        kernel,
        n_rows * n_blocks,
        outputs[0],
        *inputs,
        *outputs,
        n,
        n_blocks,
        *(x.stride(0) for x in inputs),
        ACTIVATION=activation,
        ACC=tl.float64 if outputs[0].dtype == torch.float64 else tl.float32,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@torch.library.custom_op(
    "effopt_triton::glu", mutates_args=(), schema="(Tensor gate, Tensor up, str activation) -> Tensor"
)
def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch(glu_kernel, (gate, up), (out,), activation)
    return restride(out, elementwise_strides(gate, up))


@torch.library.custom_op(
    "effopt_triton::glu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
)
def _glu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of (gate, up), both contiguous."""
    _check(gate, up, activation)
    check_alike("grad", grad, gate)
    dgate, dup = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    _launch(glu_backward_kernel, (grad, gate, up), (dgate, dup), activation)
    return dgate, dup


@_glu.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ops.glu.fake(gate, up, activation)


@_glu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_glu_backward(grad, *ctx.saved_tensors, ctx.activation), None


_glu.register_autograd(_backward, setup_context=_save)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`effopt::glu` by one kernel. Shapes, dtypes and strides of the result as there."""
    return _glu(gate, up, activation)


def _supports(target: Target, operands: Operands) -> str | None:
    gate, up, activation = operands["gate"], operands["up"], operands["activation"]
    reason = refusal(target, {"gate": gate, "up": up}) or alike_refusal("up", up, "gate", gate)
    if reason is None and activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return reason


GLU = Lowering(ops.glu, "triton", glu, _supports, roofline(ops.glu))
