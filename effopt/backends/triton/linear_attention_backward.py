"""Linear attention in chunks of tokens: the backward pass, and the lowering of the op.

The states are computed again, and their gradients carried from the last chunk to the first by the same kernel
(`linear_attention.states_kernel`). Then all chunks are taken side by side: by the kernel of the forward pass,
turned, for the value, and by `gradient_kernel`. With A = query key^T * decay between them, P = grad value^T
and B = P * decay, all causal:

    dquery = B key + start * grad state^T          dkey = B^T query + end * value dstate^T
    dvalue = A^T grad + (key * end) dstate         ddecay_m = all that comes from before token m to m or later

The gradient of a decay is summed over what passes it, not taken as a difference of running sums, which
would leave rounding where little passes. The log of a decay that is -inf gets 0.

Source: Qin et al. 2024, arXiv:2401.04658, algorithm 2; the gradient of the decay is its derivative. Not
measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.backends.base import Lowering
from effopt.backends.triton import linear_attention_step
from effopt.backends.triton.attention_scores import load_lines
from effopt.backends.triton.attention_tiles import UNMEASURED
from effopt.backends.triton.linear_attention import (
    linear_attention_forward,
    run_chunks,
    run_states,
    states_of,
)
from effopt.backends.triton.linear_attention_call import WARPS, LinearCall, checked, chunk_for, width
from effopt.backends.triton.linear_attention_channels import pair_flops, run_channel_gradients
from effopt.backends.triton.linear_attention_tiles import (
    between_block,
    chunk_of_program,
    end_block,
    gradient_products,
)
from effopt.backends.triton.rows import LAUNCH_S, alike_refusal, launch, refusal
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint, tensor_bytes
from effopt.target import Target

MAX_HEAD = 128
"""Longest query and key: a program of the backward pass holds four tiles of a chunk's rows. With gates of
channels it takes them in blocks, and only a decode step holds all."""
GRADIENT_VALUES, GRADIENT_WARPS = 32, 8
"""Columns of a state in one step of that pass, and warps that hold its four tiles without spilling."""
GRADIENT_VALUES_FLOAT32 = 16
"""Such columns where products are summed without matrix units, by the warps of the other kernels."""


@triton.jit
def gradient_kernel(
    p_grad, p_query, p_key, p_value, p_decay, p_states, p_dstates, p_dquery, p_dkey, p_ddecay,
    grad_strides, query_strides, key_strides, value_strides, decay_strides, h, t, dv,
    SCALE: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of query and key of one chunk; and of its decays in float32, `[b h, t]`."""
    chunks = tl.cdiv(t, CHUNK)
    _, i_chunk, i_line, i_b, i_h = chunk_of_program(1, chunks, h)
    o_t, o_d, o_row = i_chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK_D), tl.arange(0, CHUNK)
    m_t, o_far = o_t < t, o_t.to(tl.int64)
    p_grad += i_b * grad_strides[0] + i_h * grad_strides[1]
    p_query += i_b * query_strides[0] + i_h * query_strides[1]
    p_key += i_b * key_strides[0] + i_h * key_strides[1]
    p_value += i_b * value_strides[0] + i_h * value_strides[1]
    o_states = (i_line * chunks + i_chunk) * HEAD * dv
    b_pairs, b_dquery, b_dkey, b_through = gradient_products(
        p_grad, p_value, p_states + o_states, p_dstates + o_states, o_far, o_d, m_t, dv, grad_strides,
        value_strides, HEAD, BLOCK_DV, WIDE,
    )  # fmt: skip
    # Only now: two tiles fewer to hold in the loop.
    b_query = load_lines(p_query + o_far * query_strides[2], o_d, m_t, query_strides[3], HEAD, False)
    b_key = load_lines(p_key + o_far * key_strides[2], o_d, m_t, key_strides[3], HEAD, False)
    b_pairs = tl.where(o_row[:, None] >= o_row[None, :], b_pairs, 0.0) * SCALE
    b_dquery *= SCALE
    if p_decay is not None:
        p_gate = p_decay + i_b * decay_strides[0] + i_h * decay_strides[1] + o_far * decay_strides[2]
        b_decay = tl.load(p_gate, mask=m_t, other=0.0).to(tl.float32)
        b_pairs *= between_block(b_decay, CHUNK)
        b_dquery *= tl.exp(tl.cumsum(b_decay, axis=0))[:, None]
        b_dkey *= end_block(p_gate, decay_strides[2], m_t, CHUNK)[:, None]
        # What passes token m: pairs of a key before it and a query at it or later, the state before the chunk
        # on its way to those queries, earlier keys on their way to the end, and the state on its way through.
        m_before = o_row[:, None] > o_row[None, :]
        b_product = tl.dot(b_query.to(DOT), tl.trans(b_key.to(DOT)), input_precision="ieee")
        b_across = tl.cumsum(tl.where(m_before, b_pairs * b_product, 0.0), axis=0, reverse=True)
        b_ddecay = tl.sum(tl.where(m_before, b_across, 0.0), axis=1)
        b_ddecay += tl.cumsum(tl.sum(b_query.to(tl.float32) * b_dquery, axis=1), axis=0, reverse=True)
        b_by_key = tl.sum(b_key.to(tl.float32) * b_dkey, axis=1)
        b_ddecay += tl.sum(tl.where(m_before, b_by_key[None, :], 0.0), axis=1)
        b_ddecay += tl.sum(b_through, axis=0) * tl.exp(tl.sum(b_decay, axis=0))
        tl.store(p_ddecay + i_line * t + o_far, b_ddecay, mask=m_t)
    b_narrow = b_pairs.to(WIDE)
    b_dquery = tl.dot(b_narrow, b_key.to(WIDE), b_dquery, input_precision="ieee")
    b_dkey = tl.dot(tl.trans(b_narrow), b_query.to(WIDE), b_dkey, input_precision="ieee")
    m_row = m_t[:, None] & (o_d < HEAD)[None, :]
    o_tile = (i_line * t + o_far)[:, None] * HEAD + o_d[None, :]
    tl.store(p_dquery + o_tile, b_dquery.to(p_dquery.dtype.element_ty), mask=m_row)
    tl.store(p_dkey + o_tile, b_dkey.to(p_dkey.dtype.element_ty), mask=m_row)


def gradient_options(dtype: torch.dtype) -> dict[str, int]:
    """How `gradient_kernel` differs from the other kernels."""
    if width(dtype) == torch.float32:
        return {"BLOCK_DV": GRADIENT_VALUES_FLOAT32, "num_warps": WARPS}
    return {"BLOCK_DV": GRADIENT_VALUES, "num_warps": GRADIENT_WARPS}


@torch.library.custom_op(
    "effopt_triton::linear_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_last, Tensor query, Tensor key, Tensor value, Tensor? decay, "
    "Tensor? state, float scale) -> Tensor[]",
)
def _backward(grad: Tensor, grad_last: Tensor, *given: Any) -> list[Tensor]:
    """Gradients of query, key, value, decay and state; of the last two empty where there is none."""
    call = checked(*given)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    if grad.numel() == 0:
        return _without_tokens(grad_last, *given)
    states, _ = states_of(call)
    dstates, first = call.new_states(), torch.empty_like(grad_last, memory_format=torch.contiguous_format)
    how = {"SCALE": call.scale, "REVERSE": True}
    run_states(call, call.query, grad, grad_last.contiguous(), dstates, first, how)
    value = torch.empty_like(call.value, memory_format=torch.contiguous_format)
    run_chunks(call, (call.key, call.query, grad), dstates, value, reverse=True)
    run = run_channel_gradients if call.by_channel else _run_gradients
    query, key, *ddecay = run(call, grad, states, dstates)
    decay, state, none = *given[3:5], grad.new_zeros(0)
    if decay is not None:
        steps = ddecay[0].sum((0, 2)) if decay.dim() == 1 else ddecay[0]
        ddecay = [steps.reshape(decay.shape).to(decay.dtype)]
    return [query, key, value, *(ddecay or [none]), none.clone() if state is None else first.to(state.dtype)]


def _run_gradients(call: LinearCall, grad: Tensor, states: Tensor, dstates: Tensor) -> list[Tensor]:
    """Gradients of query and key, contiguous; and of a decay in float32, `[b, h, t]`."""
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.query, call.key)]
    ddecay = None if call.decay is None else grad.new_empty(call.query.shape[:3], dtype=torch.float32)
    launch(
        gradient_kernel,
        call.lines * call.chunks,
        grad,
        *(grad, call.query, call.key, call.value, call.decay, states, dstates, *made, ddecay),
        *(x.stride() for x in (grad, call.query, call.key, call.value)),
        call.decay_strides(),
        *call.query.shape[1:3],
        call.value.shape[-1],
        **{**call.options(0), **gradient_options(call.query.dtype)},
    )
    return made if ddecay is None else [*made, ddecay]


def _without_tokens(grad_last: Tensor, *given: Any) -> list[Tensor]:
    """Gradients where no token or no column is: the state goes through as it came."""
    made = [grad_last.new_zeros(0) if x is None else torch.zeros_like(x) for x in given[:5]]
    return made if given[4] is None else [*made[:4], grad_last.to(given[4].dtype).clone()]


@_backward.register_fake
def _(grad: Tensor, grad_last: Tensor, *given: Any) -> list[Tensor]:
    return [
        grad.new_zeros(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in given[:5]
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[5]


def _differentiate(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    made = _backward(grad, grad_last, *ctx.saved_tensors, ctx.scale)
    return *(g if n else None for g, n in zip(made, ctx.needs_input_grad[:5], strict=True)), None


linear_attention_forward.register_autograd(_differentiate, setup_context=_save)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    decay: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.linear_attention` by kernels over chunks: as there, up to float32."""
    return linear_attention_forward(query, key, value, decay, state, scale)


def _is_by_channel(operands: Operands) -> bool:
    """Whether channels decay differently."""
    decay = operands["decay"]
    return decay is not None and decay.dim() == 4 and decay.shape[-1] != 1


def _same_sizes(a: Tensor, b: Tensor) -> bool:
    return all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def _supports(target: Target, operands: Operands) -> str | None:
    query, key, value, decay = (operands[name] for name in ("query", "key", "value", "decay"))
    reason = refusal(target, {n: operands[n] for n in ("query", "key", "value", "decay", "state")})
    reason = reason or alike_refusal("key", key, "query", query)
    if reason is not None:
        return reason
    if query.dtype == torch.float64 or value.dtype != query.dtype:
        return f"query is {query.dtype}, value {value.dtype}; the kernel takes one dtype up to float32"
    sizes = (query.shape[-1], value.shape[-1])
    if not all(isinstance(n, int) for n in sizes):
        return f"head sizes {list(sizes)} are symbolic, and the tile is chosen from numbers"
    if decay is not None and decay.dim() == 4 and not _same_sizes(decay, query):
        return f"decay is {list(decay.shape)}, and the kernel wants that of the query, {list(query.shape)}"
    longest = linear_attention_step.MAX_HEAD if _is_by_channel(operands) else MAX_HEAD
    if query.shape[-1] > longest:
        return f"query has heads of {query.shape[-1]}, and one program holds at most {longest}"
    state = operands["state"]
    sized = state is None or statically_known_true(state.shape[-1] == value.shape[-1])
    return None if sized else f"state is {list(state.shape)}, which does not end in the value's {sizes[1]}"


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline of products inside chunks, of states, and of what the two kernels pass on or both read.

    A single token is one pass over the state.
    """
    query, key, value, decay = (operands[name] for name in ("query", "key", "value", "decay"))
    b, h, t, d = map(hint, query.shape)
    dv = hint(value.shape[-1])
    moved, launches = ops.linear_attention.bytes_moved(operands, result), 1
    work = 4.0 * b * h * t * d * dv
    if t > 1:
        by_channel, launches = _is_by_channel(operands), 2
        chunk = chunk_for(query.dtype, by_channel)
        pairs = pair_flops(chunk, d, dv, query.dtype) if by_channel else 2.0 * chunk * d
        work += b * h * t * (pairs + 2.0 * chunk * dv)
        moved += (
            tensor_bytes((key, value, decay))
            + 2.0 * width(query.dtype).itemsize * b * h * triton.cdiv(t, chunk) * d * dv
        )
    return UNMEASURED * max(moved / target.bytes_per_s, work / target.flops_per_s) + launches * LAUNCH_S


LINEAR_ATTENTION = Lowering(ops.linear_attention, "triton", linear_attention, _supports, _cost)
