"""Rotary position embedding, forward and backward, half-rotation and interleaved.

A program turns a tile of positions of one head. x is read where it lies (`[b, t, h, d]` transposed to
`[b, h, t, d]` needs no copy), cos and sin likewise, with stride 0 where they are broadcast; the result
is contiguous. With (x1, x2) a pair, c and s its two columns of cos and sin:

    forward    o1 = x1 c1 - x2 s1,     o2 = x2 c2 + x1 s2
    backward   d1 = g1 c1 + g2 s2,     d2 = g2 c2 - g1 s1     (the transposed turn, by the same kernel)

Reads x, cos and sin once, writes the result once: 2 tensors of x's size; cos and sin, shared by the
heads, come from the L2 cache. Gradients of cos and sin, which no model but a test asks for, are plain
PyTorch.

Source: Su et al. 2021, arXiv:2104.09864, equation 34.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.backends.base import Lowering
from effopt.backends.triton.rows import check_floating, launch, refusal, roofline
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.target import Target

TILE_PAIRS, WARPS = 1024, 4
"""Eight pairs a thread."""
MAX_HEAD_SIZE = 2048
"""A program holds whole heads; the longest in use is 576."""


@triton.jit
def load_block(p_x, x_strides, i_batch, i_head, o_pos, o_col, m_tile, ACC: tl.constexpr):
    """A tile of a `[b, h, t, d]` tensor of any strides, in the accumulation dtype."""
    p_tile = (
        p_x + i_batch * x_strides[0] + i_head * x_strides[1] + o_pos * x_strides[2] + o_col * x_strides[3]
    )
    return tl.load(p_tile, mask=m_tile, other=0.0).to(ACC)


@triton.jit
def rope_kernel(
    p_x,
    p_cos,
    p_sin,
    p_out,
    heads,
    t,
    d,
    pairs,
    x_strides,
    cos_strides,
    sin_strides,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    ACC: tl.constexpr,
):
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    n_tiles = tl.cdiv(t, ROWS)
    i_plane = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_batch, i_head = i_plane // heads, i_plane % heads
    o_pos = (tl.program_id(0) % n_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_pair = tl.arange(0, PAIRS)[None, :]
    m_tile = (o_pos < t) & (o_pair < pairs)
    if INTERLEAVED:
        o_first = 2 * o_pair
        o_second = 2 * o_pair + 1
    else:
        o_first = o_pair
        o_second = o_pair + pairs
    b_first = load_block(p_x, x_strides, i_batch, i_head, o_pos, o_first, m_tile, ACC)
    b_second = load_block(p_x, x_strides, i_batch, i_head, o_pos, o_second, m_tile, ACC)
    b_cos1 = load_block(p_cos, cos_strides, i_batch, i_head, o_pos, o_first, m_tile, ACC)
    b_cos2 = load_block(p_cos, cos_strides, i_batch, i_head, o_pos, o_second, m_tile, ACC)
    b_sin1 = load_block(p_sin, sin_strides, i_batch, i_head, o_pos, o_first, m_tile, ACC)
    b_sin2 = load_block(p_sin, sin_strides, i_batch, i_head, o_pos, o_second, m_tile, ACC)
    if BACKWARD:
        b_out1 = b_first * b_cos1 + b_second * b_sin2
        b_out2 = b_second * b_cos2 - b_first * b_sin1
    else:
        b_out1 = b_first * b_cos1 - b_second * b_sin1
        b_out2 = b_second * b_cos2 + b_first * b_sin2
    p_row = p_out + (i_plane * t + o_pos) * d
    tl.store(p_row + o_first, b_out1.to(DTYPE), mask=m_tile)
    tl.store(p_row + o_second, b_out2.to(DTYPE), mask=m_tile)
    if REST > 0:
        o_rest = 2 * pairs + tl.arange(0, REST)[None, :]
        m_rest = (o_pos < t) & (o_rest < d)
        b_rest = load_block(p_x, x_strides, i_batch, i_head, o_pos, o_rest, m_rest, ACC)
        tl.store(p_row + o_rest, b_rest.to(DTYPE), mask=m_rest)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_floating(x=x, cos=cos, sin=sin)
    if not 2 <= x.dim() <= 4 or x.shape[-1] > MAX_HEAD_SIZE:
        raise ValueError(
            f"x: expected [t, d] to [b, h, t, d], d at most {MAX_HEAD_SIZE}, got {list(x.shape)}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {table.dtype}")
        reason = _table_refusal(name, table, cos.shape[-1], x)
        if reason is not None:
            raise ValueError(reason)


def _planes(x: Tensor) -> Tensor:
    """A view of x as `[b, h, t, d]`."""
    return x[(None,) * (4 - x.dim())]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> Tensor:
    """Check, allocate, launch."""
    _check(x, cos, sin)
    out, rotary = x.new_empty(x.shape), cos.shape[-1]
    if x.numel() == 0:
        return out
    planes = _planes(x)
    b, h, t, d = planes.shape
    cos, sin = (_planes(table.expand(*x.shape[:-1], rotary)) for table in (cos, sin))
    pairs = max(1, triton.next_power_of_2(rotary // 2))
    rows = min(max(1, TILE_PAIRS // pairs), triton.next_power_of_2(t))
    launch(
        rope_kernel,
        b * h * triton.cdiv(t, rows),
        x,
        *(planes, cos, sin, out),
        *(h, t, d, rotary // 2),
        *(tensor.stride() for tensor in (planes, cos, sin)),
        INTERLEAVED=interleaved,
        BACKWARD=backward,
        ROWS=rows,
        PAIRS=pairs,
        REST=0 if rotary == d else triton.next_power_of_2(d - rotary),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        num_warps=WARPS,
    )
    return out


@torch.library.custom_op(
    "effopt_triton::rope",
    mutates_args=(),
    schema="(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
)
def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _turn(x, cos, sin, interleaved, backward=False)


@torch.library.custom_op(
    "effopt_triton::rope_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
)
def _rope_backward(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Gradient of x, contiguous."""
    return _turn(grad, cos, sin, interleaved, backward=True)


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


@_rope_backward.register_fake
def _(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return grad.new_empty(grad.shape)


def _partner(x: Tensor, interleaved: bool) -> Tensor:
    """What sin multiplies: each value's partner, negated for the first of a pair."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, ctx.interleaved = inputs
    wants_tables = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(x if wants_tables else None, cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, cos, sin = ctx.saved_tensors
    dx = _rope_backward(grad, cos, sin, ctx.interleaved) if ctx.needs_input_grad[0] else None
    dcos = dsin = None
    if x is not None:
        accumulate = torch.promote_types(x.dtype, torch.float32)
        turned, grad = (v[..., : cos.shape[-1]].to(accumulate) for v in (x, grad))
        dcos = (grad * turned).sum_to_size(cos.shape).to(cos.dtype)
        dsin = (grad * _partner(turned, ctx.interleaved)).sum_to_size(sin.shape).to(sin.dtype)
    return dx, dcos, dsin, None


_rope.register_autograd(_backward, setup_context=_save)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """`effopt::rope` by one kernel, for x of two to four dimensions and any strides."""
    return _rope(x, cos, sin, interleaved)


def _table_refusal(name: str, table: Tensor, rotary: int, x: Tensor) -> str | None:
    """Why cos or sin does not broadcast to the rotated part of x, or None."""
    if rotary % 2 or rotary > x.shape[-1] or table.shape[-1] != rotary:
        wanted = f"an even number, at most {x.shape[-1]}, the same for cos and sin"
        return f"{name} has {table.shape[-1]} columns; the kernel wants {wanted}"
    leading = zip(reversed(table.shape[:-1]), reversed(x.shape[:-1]), strict=False)
    fits = all(statically_known_true(a == 1) or statically_known_true(a == b) for a, b in leading)
    if table.dim() > x.dim() or not fits:
        return f"{name} has shape {list(table.shape)}, which is not known to broadcast to {list(x.shape)}"
    return None


def _supports(target: Target, operands: Operands) -> str | None:
    x, cos, sin = operands["x"], operands["cos"], operands["sin"]
    reason = refusal(target, {"x": x, "cos": cos, "sin": sin})
    if reason:
        return reason
    if not 2 <= x.dim() <= 4:
        return f"x has {x.dim()} dimensions, and the kernel takes [t, d] to [b, h, t, d]"
    if not all(isinstance(table.shape[-1], int) for table in (x, cos, sin)):
        return f"the head size is symbolic ({x.shape[-1]}), and the tile is chosen from a number"
    if x.shape[-1] > MAX_HEAD_SIZE:
        return f"heads of {x.shape[-1]} are longer than {MAX_HEAD_SIZE}, which one program holds"
    if cos.dtype != x.dtype or sin.dtype != x.dtype:
        return f"cos is {cos.dtype} and sin {sin.dtype}, and the kernel wants that of x, {x.dtype}"
    tables = (("cos", cos), ("sin", sin))
    return next(filter(None, (_table_refusal(n, table, cos.shape[-1], x) for n, table in tables)), None)


ROPE = Lowering(ops.rope, "triton", rope, _supports, roofline(ops.rope))
