"""The selective scan, forward and backward: the state in registers, one step after the other.

Forward: a program holds `[channels, n]` of one batch entry's state and walks through time. Each step reads
one value a channel of u and delta, and n of b and c. Decays and inputs of `[b, d, t, n]` exist in registers
alone. The state before each chunk of steps is written for the backward pass.

Backward: chunks from the last to the first. A program computes the states of a chunk anew, from the one
that was kept, into a scratch buffer that it alone reads, then walks back through it. With g the gradient of
the state after a step, h' the state before it and decay = exp(delta a):

    g += dy c;  dc = sum_d(dy h);  db = sum_d(g delta u);  du = delta sum_n(g b)
    ddelta = sum_n(g (a decay h' + b u));  da += g decay h' delta;  g *= decay

Sums over channels are partial for each program and added by PyTorch in a fixed order: no atomics, so the
bits repeat. Accumulates in float32, or float64 for such operands.

Source: Gu & Dao 2023, arXiv:2312.00752, section 3.3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.backends.triton.rows import LAUNCH_S, check_floating, launch, refusal
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.graph.ops.selective_scan import check_shapes
from effopt.target import Target

CHUNK = 32
"""Steps between states that are kept: at 32, they and the scratch are small beside u, delta, b and c's
`[b, d, t, n]`, which no one writes."""
MAX_STATE = 256
"""Most numbers of a channel's state: 16 channels of them are 4096 float32, 32 a thread of 4 warps."""
WARPS = 4


def channels_for(n: int) -> int:
    """Channels of a program: 512 numbers of the state, which leaves enough programs to fill a GPU."""
    return max(4, min(64, 512 // triton.next_power_of_2(n)))


@triton.jit
def selective_scan_kernel(
    p_u, p_delta, p_a, p_b, p_c, p_start, p_y, p_last, p_kept, d, n, t,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(d, CHANNELS)
    i_batch, i_block = tl.program_id(0).to(tl.int64) // n_blocks, tl.program_id(0) % n_blocks
    o_d = i_block * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    o_n = tl.arange(0, STATE).to(tl.int64)
    m_d, m_n = o_d < d, o_n < n
    m_state = m_d[:, None] & m_n[None, :]
    o_rates = o_d[:, None] * n + o_n[None, :]
    o_state = i_batch * d * n + o_rates
    o_row, o_column = (i_batch * d + o_d) * t, (i_batch * n + o_n) * t
    state_size = tl.num_programs(0).to(tl.int64) // n_blocks * d * n
    b_a = tl.load(p_a + o_rates, mask=m_state, other=0.0).to(ACC)
    b_state = tl.zeros([CHANNELS, STATE], dtype=ACC)
    if p_start is not None:
        b_state = tl.load(p_start + o_state, mask=m_state, other=0.0).to(ACC)
    i_t = 0
    while i_t < t:
        if i_t % CHUNK == 0:
            tl.store(p_kept + (i_t // CHUNK) * state_size + o_state, b_state, mask=m_state)
        b_u = tl.load(p_u + o_row + i_t, mask=m_d, other=0.0).to(ACC)
        b_delta = tl.load(p_delta + o_row + i_t, mask=m_d, other=0.0).to(ACC)
        b_b = tl.load(p_b + o_column + i_t, mask=m_n, other=0.0).to(ACC)
        b_c = tl.load(p_c + o_column + i_t, mask=m_n, other=0.0).to(ACC)
        b_state = tl.exp(b_delta[:, None] * b_a) * b_state + (b_delta * b_u)[:, None] * b_b[None, :]
        # Padding holds zeros of b and c, but 0 * inf of a state that overflowed is none.
        b_y = tl.sum(tl.where(m_n[None, :], b_state * b_c[None, :], 0.0), axis=1)
        tl.store(p_y + o_row + i_t, b_y.to(p_y.dtype.element_ty), mask=m_d)
        i_t += 1
    tl.store(p_last + o_state, b_state, mask=m_state)


@triton.jit
def selective_scan_backward_kernel(
    p_grad, p_grad_last, p_u, p_delta, p_a, p_b, p_c, p_kept, p_scratch,
    p_du, p_ddelta, p_da, p_db, p_dc, p_dstart, d, n, t,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(d, CHANNELS)
    i_program = tl.program_id(0).to(tl.int64)
    i_batch, i_block = i_program // n_blocks, i_program % n_blocks
    o_d = i_block * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    o_n = tl.arange(0, STATE).to(tl.int64)
    m_d, m_n = o_d < d, o_n < n
    m_state = m_d[:, None] & m_n[None, :]
    o_rates = o_d[:, None] * n + o_n[None, :]
    o_state = i_batch * d * n + o_rates
    o_row, o_column = (i_batch * d + o_d) * t, (i_batch * n + o_n) * t
    # Partial sums over the channels of this program: [blocks, b, n, t].
    state_size = tl.num_programs(0).to(tl.int64) // n_blocks * d * n
    o_partial = i_block * (tl.num_programs(0).to(tl.int64) // n_blocks * n * t) + o_column
    o_scratch = i_program * CHUNK * CHANNELS * STATE
    o_scratch += tl.arange(0, CHANNELS)[:, None] * STATE + tl.arange(0, STATE)[None, :]
    b_a = tl.load(p_a + o_rates, mask=m_state, other=0.0).to(ACC)
    b_grad = tl.zeros([CHANNELS, STATE], dtype=ACC)
    if p_grad_last is not None:
        b_grad = tl.load(p_grad_last + o_state, mask=m_state, other=0.0).to(ACC)
    b_da = tl.zeros([CHANNELS, STATE], dtype=ACC)
    i_chunk = tl.cdiv(t, CHUNK) - 1
    while i_chunk >= 0:
        i_first = i_chunk * CHUNK
        i_last = tl.minimum(t, i_first + CHUNK) - 1
        b_state = tl.load(p_kept + i_chunk * state_size + o_state, mask=m_state, other=0.0).to(ACC)
        i_t = i_first
        while i_t <= i_last:
            tl.store(p_scratch + o_scratch + (i_t - i_first) * CHANNELS * STATE, b_state)
            b_u = tl.load(p_u + o_row + i_t, mask=m_d, other=0.0).to(ACC)
            b_delta = tl.load(p_delta + o_row + i_t, mask=m_d, other=0.0).to(ACC)
            b_b = tl.load(p_b + o_column + i_t, mask=m_n, other=0.0).to(ACC)
            b_state = tl.exp(b_delta[:, None] * b_a) * b_state + (b_delta * b_u)[:, None] * b_b[None, :]
            i_t += 1
        # What one thread wrote, another may read.
        tl.debug_barrier()
        i_t = i_last
        while i_t >= i_first:
            b_before = tl.load(p_scratch + o_scratch + (i_t - i_first) * CHANNELS * STATE)
            b_u = tl.load(p_u + o_row + i_t, mask=m_d, other=0.0).to(ACC)
            b_delta = tl.load(p_delta + o_row + i_t, mask=m_d, other=0.0).to(ACC)
            b_b = tl.load(p_b + o_column + i_t, mask=m_n, other=0.0).to(ACC)
            b_decay = tl.exp(b_delta[:, None] * b_a)
            b_decayed = b_decay * b_before
            if p_grad is not None:
                b_dy = tl.load(p_grad + o_row + i_t, mask=m_d, other=0.0).to(ACC)
                b_c = tl.load(p_c + o_column + i_t, mask=m_n, other=0.0).to(ACC)
                b_after = b_decayed + (b_delta * b_u)[:, None] * b_b[None, :]
                b_dc = tl.sum(tl.where(m_state, b_dy[:, None] * b_after, 0.0), axis=0)
                tl.store(p_dc + o_partial + i_t, b_dc, mask=m_n)
                b_grad += b_dy[:, None] * b_c[None, :]
            b_grad = tl.where(m_state, b_grad, 0.0)
            b_db = tl.sum(b_grad * (b_delta * b_u)[:, None], axis=0)
            tl.store(p_db + o_partial + i_t, b_db, mask=m_n)
            b_into = tl.sum(b_grad * b_b[None, :], axis=1)
            b_through = tl.where(m_state, b_grad * b_decayed, 0.0)
            b_ddelta = tl.sum(b_through * b_a, axis=1) + b_into * b_u
            tl.store(p_du + o_row + i_t, (b_into * b_delta).to(p_du.dtype.element_ty), mask=m_d)
            tl.store(p_ddelta + o_row + i_t, b_ddelta.to(p_ddelta.dtype.element_ty), mask=m_d)
            b_da += b_through * b_delta[:, None]
            b_grad *= b_decay
            i_t -= 1
        tl.debug_barrier()
        i_chunk -= 1
    tl.store(p_da + o_state, b_da, mask=m_state)
    tl.store(p_dstart + o_state, b_grad, mask=m_state)


def _options(n: int, accumulate: torch.dtype) -> dict[str, Any]:
    sizes = {"CHUNK": CHUNK, "CHANNELS": channels_for(n), "STATE": triton.next_power_of_2(n)}
    return sizes | {"ACC": tl.float64 if accumulate == torch.float64 else tl.float32, "num_warps": WARPS}


@torch.library.custom_op(
    "effopt_triton::selective_scan",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? start) "
    "-> (Tensor, Tensor, Tensor)",
)
def _scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the last state, and the state before each chunk."""
    check_floating(u=u, delta=delta, a=a, b=b, c=c, start=start)
    _check(u, delta, a, b, c, start)
    (batch, d, t), n = u.shape, a.shape[1]
    accumulate = torch.promote_types(u.dtype, torch.float32)
    y, last = u.new_empty(u.shape), u.new_empty((batch, d, n), dtype=accumulate)
    kept = u.new_empty((triton.cdiv(t, CHUNK), batch, d, n), dtype=accumulate)
    options = _options(n, accumulate)
    given = (x if x is None else x.contiguous() for x in (u, delta, a, b, c, start))
    launch(
        selective_scan_kernel,
        batch * triton.cdiv(d, options["CHANNELS"]),
        u,
        *given,
        *(y, last, kept, d, n, t),
        **options,
    )
    return y, last, kept


@torch.library.custom_op(
    "effopt_triton::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor? grad, Tensor? grad_last, Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, "
    "Tensor kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan_backward(
    grad: Tensor | None,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, a, b, c, start)."""
    (batch, d, t), n = u.shape, a.shape[1]
    options = _options(n, kept.dtype)
    blocks = triton.cdiv(d, options["CHANNELS"])
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    da, dstart = (kept.new_empty((batch, d, n)) for _ in range(2))
    db, dc = (kept.new_empty((blocks, batch, n, t)) for _ in range(2))
    size = CHUNK * options["CHANNELS"] * options["STATE"]
    scratch = kept.new_empty((batch * blocks, size))
    given = (x if x is None else x.contiguous() for x in (grad, grad_last, u, delta, a, b, c))
    launch(
        selective_scan_backward_kernel,
        batch * blocks,
        u,
        *given,
        *(kept, scratch, du, ddelta, da, db, dc, dstart, d, n, t),
        **options,
    )
    dc = torch.zeros_like(c) if grad is None else dc.sum(0).to(c.dtype)
    return du, ddelta, da.sum(0).to(a.dtype), db.sum(0).to(b.dtype), dc, dstart


@_scan.register_fake
def _(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, last = ops.selective_scan.fake(u, delta, a, b, c, start)
    return y, last, last.new_empty(((u.shape[2] + CHUNK - 1) // CHUNK, *last.shape))


@_scan_backward.register_fake
def _(
    grad: Any, grad_last: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, kept: Tensor
) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (u, delta, a, b, c)), kept.new_empty(kept.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, start = inputs
    ctx.start_dtype = None if start is None else start.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, output[2])


def _differentiate(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None and grad_last is None:
        return (None,) * 6
    *found, dc, dstart = _scan_backward(grad, grad_last, *ctx.saved_tensors)
    return (
        *found,
        None if grad is None else dc,
        None if ctx.start_dtype is None else dstart.to(ctx.start_dtype),
    )


_scan.register_autograd(_differentiate, setup_context=_save)


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`effopt::selective_scan` by one kernel. Shapes and dtypes as there; operands are made contiguous."""
    y, last, _ = _scan(u, delta, a, b, c, start)
    return y, last


def _check(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None) -> None:
    check_shapes(u, delta, a, b, c, start)
    n = a.shape[-1]
    if n > MAX_STATE:
        raise ValueError(f"a: expected at most {MAX_STATE} numbers of state, got {n}")


def _supports(target: Target, operands: Operands) -> str | None:
    given = {name: operands[name] for name in ("u", "delta", "a", "b", "c", "start")}
    n = operands["a"].shape[1]
    if isinstance(n, int) and n > MAX_STATE:
        return f"a has {n} numbers of state for each channel, and a program holds at most {MAX_STATE}"
    if not isinstance(n, int):
        return f"the size of the state is symbolic ({n}), and the tile is chosen from a number"
    return refusal(target, given)


def _cost(target: Target, operands: Operands, result: Any) -> float:
    op = ops.selective_scan
    moved, work = op.bytes_moved(operands, result), op.flops(operands, result)
    return max(moved / target.bytes_per_s, work / target.flops_per_s) + LAUNCH_S


SELECTIVE_SCAN = Lowering(ops.selective_scan, "triton", selective_scan, _supports, _cost)
