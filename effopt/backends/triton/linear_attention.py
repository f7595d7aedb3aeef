"""Linear attention in chunks of tokens: the forward pass, and what the backward pass shares with it.

Two kernels. `states_kernel` walks over the chunks of a head and writes the state before each:

    state = decay of the chunk * state + (key * decay until the chunk ends)^T value

and `chunk_kernel` takes all chunks side by side:

    out = (query key^T * decay between them, causal) value + (query * decay since the chunk began) state

Gates of channels are in linear_attention_channels.py, and a single token, as in decoding, in
linear_attention_step.py.

Reads key and value twice and the query once, and writes and reads one state for each chunk, in what products
read it in: d * dv / 64 numbers a token in bfloat16. Accumulates in float32. Logarithms of decay are summed
and never subtracted: a decay of -inf gives no NaN, and a strong one takes no digits of a weak one behind it.
Values of a chunk that are not finite make rows before them no NaN.

Source: Qin et al. 2024, arXiv:2401.04658, algorithm 1; Yang et al. 2023, arXiv:2312.06635, section 4.1
(states first, then all chunks in parallel). Not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.triton.attention_scores import load_lines
from effopt.backends.triton.linear_attention_call import (
    STAGES,
    STATE_STAGES,
    LinearCall,
    checked,
)
from effopt.backends.triton.linear_attention_channels import STATE_CHANNELS, STATE_WARPS, run_channel_chunks
from effopt.backends.triton.linear_attention_step import run_step
from effopt.backends.triton.linear_attention_tiles import (
    between_block,
    chunk_of_program,
    end_block,
    left_block,
    load_gates,
    store_weighed,
)
from effopt.backends.triton.rows import launch
from effopt.graph import ops


@triton.jit
def states_kernel(
    p_x, p_y, p_decay, p_first, p_states, p_last, x_strides, y_strides, decay_strides, h, t, dv,
    SCALE: tl.constexpr, REVERSE: tl.constexpr, BY_CHANNEL: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The state before each chunk. REVERSE: the gradient of the state behind it, from the last to the first.

    x is the key and y the value; in reverse the query and the gradient of the result.
    """
    blocks = tl.cdiv(dv, BLOCK_DV)
    i_line, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    i_first = 0
    if BLOCK_D < HEAD:
        i_first = (i_line % tl.cdiv(HEAD, BLOCK_D)).to(tl.int32) * BLOCK_D
        i_line = i_line // tl.cdiv(HEAD, BLOCK_D)
    i_b, i_h = i_line // h, i_line % h
    chunks = tl.cdiv(t, CHUNK)
    o_d, o_dv = i_first + tl.arange(0, BLOCK_D), i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_state = (o_d < HEAD)[:, None] & (o_dv < dv)[None, :]
    o_state = o_d.to(tl.int64)[:, None] * dv + o_dv[None, :]
    p_x += i_b * x_strides[0] + i_h * x_strides[1]
    p_y += i_b * y_strides[0] + i_h * y_strides[1]
    b_state = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    if p_first is not None:
        b_state += tl.load(p_first + i_line * HEAD * dv + o_state, mask=m_state, other=0.0).to(tl.float32)
    for i in tl.range(0, chunks):
        i_chunk = chunks - 1 - i if REVERSE else i
        p_state = p_states + (i_line * chunks + i_chunk) * HEAD * dv + o_state
        tl.store(p_state, b_state.to(p_states.dtype.element_ty), mask=m_state)
        o_t = i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_t, o_far = o_t < t, o_t.to(tl.int64)
        b_x = load_lines(p_x + o_far * x_strides[2], o_d, m_t, x_strides[3], HEAD, False)
        m_y = m_t[:, None] & (o_dv < dv)[None, :]
        p_tile = p_y + o_far[:, None] * y_strides[2] + o_dv[None, :] * y_strides[3]
        # The narrower of the two is scaled: the other goes to the product as it was loaded.
        b_y = tl.load(p_tile, mask=m_y, other=0.0).to(tl.float32) * SCALE
        if BY_CHANNEL:
            p_gate = p_decay + i_b * decay_strides[0] + i_h * decay_strides[1]
            b_gate, b_behind = load_gates(p_gate, i_chunk, o_d, t, decay_strides[2], HEAD, CHUNK)
            b_since, b_until = left_block(b_gate, b_behind, CHUNK)
            b_x = b_x.to(tl.float32) * (b_since if REVERSE else b_until)
            b_state *= tl.exp(tl.sum(b_gate, axis=0))[:, None]
        elif p_decay is not None:
            p_gate = p_decay + i_b * decay_strides[0] + i_h * decay_strides[1] + o_far * decay_strides[2]
            b_decay = tl.load(p_gate, mask=m_t, other=0.0).to(tl.float32)
            if REVERSE:
                b_y *= tl.exp(tl.cumsum(b_decay, axis=0))[:, None]
            else:
                b_y *= end_block(p_gate, decay_strides[2], m_t, CHUNK)[:, None]
            b_state *= tl.exp(tl.sum(b_decay, axis=0))
        b_state = tl.dot(tl.trans(b_x.to(WIDE)), b_y.to(WIDE), b_state, input_precision="ieee")
    tl.store(p_last + i_line * HEAD * dv + o_state, b_state, mask=m_state)


@triton.jit
def chunk_kernel(
    p_query, p_key, p_value, p_decay, p_states, p_out, query_strides, key_strides, value_strides,
    decay_strides, h, t, dv,
    SCALE: tl.constexpr, REVERSE: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The result of one chunk, for one block of columns of the value.

    REVERSE: the gradient of the value. The query is then the key, the key the query, the value the gradient
    of the result, and the states their gradients, which are scaled.
    """
    blocks, chunks = tl.cdiv(dv, BLOCK_DV), tl.cdiv(t, CHUNK)
    i_block, i_chunk, i_line, i_b, i_h = chunk_of_program(blocks, chunks, h)
    o_t, o_d = i_chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    o_dv = i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_t, o_far = o_t < t, o_t.to(tl.int64)
    p_query += i_b * query_strides[0] + i_h * query_strides[1]
    p_key += i_b * key_strides[0] + i_h * key_strides[1]
    p_value += i_b * value_strides[0] + i_h * value_strides[1]
    b_query = load_lines(p_query + o_far * query_strides[2], o_d, m_t, query_strides[3], HEAD, False)
    b_key = load_lines(p_key + o_far * key_strides[2], o_d, m_t, key_strides[3], HEAD, False)
    b_weight = tl.dot(b_query.to(DOT), tl.trans(b_key.to(DOT)), input_precision="ieee")
    b_weight *= SCALE
    b_past = b_query.to(tl.float32)
    if not REVERSE:
        b_past *= SCALE
    if p_decay is not None:
        p_gate = p_decay + i_b * decay_strides[0] + i_h * decay_strides[1] + o_far * decay_strides[2]
        b_decay = tl.load(p_gate, mask=m_t, other=0.0).to(tl.float32)
        b_between = between_block(b_decay, CHUNK)
        if REVERSE:
            b_weight *= tl.trans(b_between)
            b_past *= end_block(p_gate, decay_strides[2], m_t, CHUNK)[:, None]
        else:
            b_weight *= b_between
            b_past *= tl.exp(tl.cumsum(b_decay, axis=0))[:, None]
    o_row = tl.arange(0, CHUNK)
    o_query, o_key = o_row[:, None], o_row[None, :]
    b_weight = tl.where((o_query <= o_key) if REVERSE else (o_query >= o_key), b_weight, 0.0)
    p_state = p_states + (i_line * chunks + i_chunk) * HEAD * dv + o_d[:, None] * dv + o_dv[None, :]
    b_state = tl.load(p_state, mask=(o_d < HEAD)[:, None] & (o_dv < dv)[None, :], other=0.0)
    b_out = tl.dot(b_past.to(WIDE), b_state.to(WIDE), input_precision="ieee")
    store_weighed(
        b_out, b_weight, p_value, p_out + i_line * t * dv, o_t, o_dv, m_t, dv, value_strides, REVERSE, WIDE
    )


def states_of(call: LinearCall) -> tuple[Tensor, Tensor]:
    """The states before each chunk `[b h, chunks, d, dv]`, and the last `[b, h, d, dv]`."""
    states, shape = call.new_states(), call.query.shape
    last = states.new_empty((*shape[:2], *states.shape[2:]), dtype=torch.float32)
    run_states(call, call.key, call.value, call.state, states, last, {"SCALE": 1.0, "REVERSE": False})
    return states, last


def run_states(
    call: LinearCall, x: Tensor, y: Tensor, first: Tensor | None, states: Tensor, last: Tensor, how: Any
) -> None:
    """Launch the kernel that carries a state; `how` are its SCALE and REVERSE."""
    columns = call.walk_columns
    options = {**call.options(columns), **how, "BY_CHANNEL": call.by_channel, "num_stages": STATE_STAGES}
    del options["DOT"]
    if call.by_channel:
        block = min(STATE_CHANNELS, options["BLOCK_D"])
        options |= {"BLOCK_D": block, "num_warps": STATE_WARPS, "num_stages": STAGES}
    launch(
        states_kernel,
        call.programs(columns) * triton.cdiv(call.query.shape[-1], options["BLOCK_D"]),
        x,
        *(x, y, call.decay, first, states, last),
        *(x.stride(), y.stride(), call.decay_strides()),
        *call.query.shape[1:3],
        y.shape[-1],
        **options,
    )


def run_chunks(
    call: LinearCall, operands: tuple[Tensor, Tensor, Tensor], states: Tensor, out: Tensor, reverse: bool
) -> None:
    """Launch the kernel that takes all chunks side by side; `out` is contiguous."""
    if call.by_channel:
        return run_channel_chunks(call, operands, states, out, reverse)
    columns = call.chunk_columns
    launch(
        chunk_kernel,
        call.programs(columns) * call.chunks,
        out,
        *(*operands, call.decay, states, out),
        *(*(x.stride() for x in operands), call.decay_strides()),
        *call.query.shape[1:3],
        call.value.shape[-1],
        REVERSE=reverse,
        **call.options(columns),
    )


def empty_result(call: LinearCall, out: Tensor) -> tuple[Tensor, Tensor]:
    """What a call without tokens or columns gives: the state as it came."""
    sizes = (*call.query.shape[:2], call.query.shape[-1], call.value.shape[-1])
    last = out.new_zeros(sizes, dtype=torch.float32)
    return out, last if call.state is None else last.copy_(call.state)


@torch.library.custom_op(
    "effopt_triton::linear_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? state, float scale) "
    "-> (Tensor, Tensor)",
)
def linear_attention_forward(*given: Any) -> tuple[Tensor, Tensor]:
    call = checked(*given)
    out = call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
    if out.numel() == 0:
        return empty_result(call, out)
    if call.query.shape[2] == 1:
        return out, run_step(call, out)
    states, last = states_of(call)
    run_chunks(call, (call.query, call.key, call.value), states, out, reverse=False)
    return out, last


@linear_attention_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return ops.linear_attention.fake(query, key, value)
