"""Linear attention with a gate for each channel: the tokens of a chunk, forward and backward.

The weight of key j for query i is sum_d query_i key_j exp(the gates behind j up to i), which no product of
two matrices is at once: taken from one reference for the whole chunk, exp overflows. So a chunk is halved,
and its halves again. At each level the queries of an upper half and the keys of the lower half beside it
meet where the two halves do:

    weight = (query * exp(gates since its half began)) (key * exp(gates until its half ends))^T

Nothing is subtracted, so both exponents are at most 0 where no gate is above it, and the gates of other pairs
take no digits. Every pair of two tokens is in exactly one level: log2(CHUNK) products of matrices take all,
and the diagonal, which no gate touches, is query . key. The gradient of a gate is summed over what passes it,
from the largest halves down.

`states_kernel` of linear_attention.py carries the states; then `channel_chunk_kernel` takes all chunks side
by side, and in the backward pass again for the value, beside `channel_gradient_kernel` for the rest.

Source: Yang et al. 2023, arXiv:2312.06635, sections 4.2 and 4.3 (chunks, and a second level of them; the
halving is not in it). Not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.triton.attention_scores import load_lines
from effopt.backends.triton.linear_attention_call import WARPS, LinearCall
from effopt.backends.triton.linear_attention_tiles import (
    chunk_of_program,
    gradient_products,
    left_block,
    load_gates,
    store_weighed,
)
from effopt.backends.triton.rows import launch

CHANNELS = 16
"""Channels that a program holds at a time. With 32 the backward pass spills 40 to 136 bytes a thread on
sm_80, sm_90 and sm_100, and the forward pass in float32 408 on sm_90 (ptxas of Triton 3.9)."""
STATE_CHANNELS, STATE_WARPS = 64, 8
"""And one that carries a state; with half of the warps it spills up to 64 bytes on sm_90 in bfloat16."""
COLUMNS, COLUMNS_FLOAT32 = 128, 64
"""Columns of the value in a program of the forward pass, which weighs all pairs of its chunk again; and where
products are of float32."""
GRADIENT_VALUES, GRADIENT_WARPS = 32, 2
"""Columns in one step of the backward pass, whose tiles are two warps' products."""


def columns_for(dtype: torch.dtype, dv: int) -> int:
    """Columns of the value in a program of the forward pass."""
    most = COLUMNS if dtype == torch.bfloat16 else COLUMNS_FLOAT32
    return min(most, max(16, triton.next_power_of_2(dv)))


_ELEMENTWISE, _OF_MATRIX = 20.0, 16.0
"""Operations on a channel of a token at one level beside the product (two sums, two exponentials, scaling,
rounding), and how many of a product's take as long as one: 989 to 67 TFLOP/s on an H100 in bfloat16."""


def pair_flops(chunk: int, d: int, dv: int, dtype: torch.dtype) -> float:
    """What weighing the pairs of a chunk takes for each token of a head, in operations of a product."""
    levels, times = chunk.bit_length() - 1, triton.cdiv(dv, columns_for(dtype, dv))
    return times * levels * d * (2.0 * chunk + _ELEMENTWISE * _OF_MATRIX)


@triton.jit
def channel_chunk_kernel(
    p_query, p_key, p_value, p_decay, p_states, p_out, query_strides, key_strides, value_strides,
    decay_strides, h, t, dv,
    SCALE: tl.constexpr, REVERSE: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The result of one chunk.

    REVERSE: the gradient of the value. The query is then the key, the key the query, the value the gradient
    of the result, and the states their gradients, which are scaled.
    """
    blocks, chunks = tl.cdiv(dv, BLOCK_DV), tl.cdiv(t, CHUNK)
    i_block, i_chunk, i_line, i_b, i_h = chunk_of_program(blocks, chunks, h)
    o_row, o_dv = tl.arange(0, CHUNK), i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    o_t = i_chunk * CHUNK + o_row
    m_t, o_far = o_t < t, o_t.to(tl.int64)
    p_query += i_b * query_strides[0] + i_h * query_strides[1]
    p_key += i_b * key_strides[0] + i_h * key_strides[1]
    p_value += i_b * value_strides[0] + i_h * value_strides[1]
    p_gate = p_decay + i_b * decay_strides[0] + i_h * decay_strides[1]
    p_states += (i_line * chunks + i_chunk) * HEAD * dv
    o_query, o_key = o_row[:, None], o_row[None, :]
    b_weight = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_out = tl.zeros([CHUNK, BLOCK_DV], tl.float32)
    for i in tl.range(0, tl.cdiv(HEAD, BLOCK_D)):
        o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        b_query = load_lines(p_query + o_far * query_strides[2], o_d, m_t, query_strides[3], HEAD, False)
        b_key = load_lines(p_key + o_far * key_strides[2], o_d, m_t, key_strides[3], HEAD, False)
        b_query, b_key = b_query.to(tl.float32), b_key.to(tl.float32)
        b_gate, b_behind = load_gates(p_gate, i_chunk, o_d, t, decay_strides[2], HEAD, CHUNK)
        b_weight += tl.where(o_query == o_key, tl.sum(b_query * b_key, axis=1)[:, None], 0.0)
        for LEVEL in tl.static_range(LEVELS):
            b_since, b_until = left_block(b_gate, b_behind, 1 << LEVEL)
            b_left = b_query * (b_until if REVERSE else b_since)
            b_right = b_key * (b_since if REVERSE else b_until)
            b_level = tl.dot(b_left.to(WIDE), tl.trans(b_right.to(WIDE)), input_precision="ieee")
            m_level = ((o_query >> LEVEL) ^ (o_key >> LEVEL)) == 1
            m_level = m_level & ((o_query < o_key) if REVERSE else (o_query > o_key))
            b_weight += tl.where(m_level, b_level, 0.0)
        b_since, b_until = left_block(b_gate, b_behind, CHUNK)
        b_past = b_query * (b_until if REVERSE else b_since * SCALE)
        m_state = (o_d < HEAD)[:, None] & (o_dv < dv)[None, :]
        b_state = tl.load(p_states + o_d[:, None] * dv + o_dv[None, :], mask=m_state, other=0.0)
        b_out = tl.dot(b_past.to(WIDE), b_state.to(WIDE), b_out, input_precision="ieee")
    store_weighed(
        b_out, b_weight * SCALE, p_value, p_out + i_line * t * dv, o_t, o_dv, m_t, dv, value_strides,
        REVERSE, WIDE,
    )  # fmt: skip


@triton.jit
def other_half(b_part, SIZE: tl.constexpr):
    """For each token the sum over the half of SIZE tokens beside its own."""
    CHUNK: tl.constexpr = b_part.shape[0]
    WIDTH: tl.constexpr = b_part.shape[1]
    PAIRS: tl.constexpr = CHUNK // (2 * SIZE)
    b_sum = tl.sum(tl.reshape(b_part, (PAIRS, 2, SIZE, WIDTH)), axis=2, keep_dims=True)
    m_upper = (tl.arange(0, 2) == 1)[None, :, None, None]
    b_lower = tl.sum(tl.where(m_upper, 0.0, b_sum), axis=1, keep_dims=True)
    b_upper = tl.sum(tl.where(m_upper, b_sum, 0.0), axis=1, keep_dims=True)
    b_other = tl.where(m_upper, b_lower, b_upper)
    return tl.reshape(tl.broadcast_to(b_other, (PAIRS, 2, SIZE, WIDTH)), (CHUNK, WIDTH))


@triton.jit
def channel_gradient_kernel(
    p_grad, p_query, p_key, p_value, p_decay, p_states, p_dstates, p_dquery, p_dkey, p_ddecay,
    grad_strides, query_strides, key_strides, value_strides, decay_strides, h, t, dv,
    SCALE: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of query, key and gates of one chunk, for one block of channels."""
    blocks, chunks = tl.cdiv(HEAD, BLOCK_D), tl.cdiv(t, CHUNK)
    i_block, i_chunk, i_line, i_b, i_h = chunk_of_program(blocks, chunks, h)
    o_row, o_d = tl.arange(0, CHUNK), i_block * BLOCK_D + tl.arange(0, BLOCK_D)
    o_t = i_chunk * CHUNK + o_row
    m_t, o_far = o_t < t, o_t.to(tl.int64)
    p_grad += i_b * grad_strides[0] + i_h * grad_strides[1]
    p_query += i_b * query_strides[0] + i_h * query_strides[1]
    p_key += i_b * key_strides[0] + i_h * key_strides[1]
    p_value += i_b * value_strides[0] + i_h * value_strides[1]
    p_gate = p_decay + i_b * decay_strides[0] + i_h * decay_strides[1]
    o_states = (i_line * chunks + i_chunk) * HEAD * dv
    b_pairs, b_dquery, b_dkey, b_through = gradient_products(
        p_grad, p_value, p_states + o_states, p_dstates + o_states, o_far, o_d, m_t, dv, grad_strides,
        value_strides, HEAD, BLOCK_DV, WIDE,
    )  # fmt: skip
    b_query = load_lines(p_query + o_far * query_strides[2], o_d, m_t, query_strides[3], HEAD, False)
    b_key = load_lines(p_key + o_far * key_strides[2], o_d, m_t, key_strides[3], HEAD, False)
    b_query, b_key = b_query.to(tl.float32), b_key.to(tl.float32)
    b_gate, b_behind = load_gates(p_gate, i_chunk, o_d, t, decay_strides[2], HEAD, CHUNK)
    o_query, o_key = o_row[:, None], o_row[None, :]
    b_pairs *= SCALE
    b_own = tl.sum(tl.where(o_query == o_key, b_pairs, 0.0), axis=1)[:, None]
    b_narrow = b_pairs.to(WIDE)
    b_since, b_until = left_block(b_gate, b_behind, CHUNK)
    b_dquery *= b_since * SCALE
    b_dkey *= b_until
    # A gate's gradient is summed over what passes it. A token's pair with itself passes none, and is last.
    b_ddecay = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    b_ddecay += (b_through * tl.exp(tl.sum(b_gate, axis=0)))[None, :]
    for LEVEL in tl.static_range(LEVELS - 1, -1, -1):
        m_upper = (o_query >> LEVEL) % 2 == 1
        b_ddecay += other_half(tl.where(m_upper, b_query * b_dquery, b_key * b_dkey), 1 << LEVEL)
        b_since, b_until = left_block(b_gate, b_behind, 1 << LEVEL)
        m_level = (((o_query >> LEVEL) ^ (o_key >> LEVEL)) == 1) & (o_query > o_key)
        b_level = tl.where(m_level, b_narrow, 0.0)
        b_right, b_left = (b_key * b_until).to(WIDE), (b_query * b_since).to(WIDE)
        b_dquery += tl.dot(b_level, b_right, input_precision="ieee") * b_since
        b_dkey += tl.dot(tl.trans(b_level), b_left, input_precision="ieee") * b_until
    b_ddecay += b_query * b_dquery
    b_dquery += b_own * b_key
    b_dkey += b_own * b_query
    m_row = m_t[:, None] & (o_d < HEAD)[None, :]
    o_tile = (i_line * t + o_far)[:, None] * HEAD + o_d[None, :]
    tl.store(p_dquery + o_tile, b_dquery.to(p_dquery.dtype.element_ty), mask=m_row)
    tl.store(p_dkey + o_tile, b_dkey.to(p_dkey.dtype.element_ty), mask=m_row)
    tl.store(p_ddecay + o_tile, b_ddecay.to(p_ddecay.dtype.element_ty), mask=m_row)


def run_channel_chunks(
    call: LinearCall, operands: tuple[Tensor, Tensor, Tensor], states: Tensor, out: Tensor, reverse: bool
) -> None:
    """`linear_attention.run_chunks` for a gate a channel."""
    columns = columns_for(call.query.dtype, call.value.shape[-1])
    launch(
        channel_chunk_kernel,
        call.lines * call.chunks * triton.cdiv(call.value.shape[-1], columns),
        out,
        *(*operands, call.decay, states, out),
        *(*(x.stride() for x in operands), call.decay_strides()),
        *call.query.shape[1:3],
        call.value.shape[-1],
        **{**_options(call), "REVERSE": reverse, "BLOCK_DV": columns, "num_warps": WARPS},
    )


def run_channel_gradients(call: LinearCall, grad: Tensor, states: Tensor, dstates: Tensor) -> list[Tensor]:
    """Gradients of query, key and gates, contiguous; `grad` has rows of unit stride."""
    given = (call.query, call.key, call.decay)
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given if x is not None]
    launch(
        channel_gradient_kernel,
        call.lines * call.chunks * triton.cdiv(call.query.shape[-1], CHANNELS),
        grad,
        *(grad, call.query, call.key, call.value, call.decay, states, dstates, *made),
        *(x.stride() for x in (grad, call.query, call.key, call.value)),
        call.decay_strides(),
        *call.query.shape[1:3],
        call.value.shape[-1],
        **{**_options(call), "BLOCK_DV": GRADIENT_VALUES, "num_warps": GRADIENT_WARPS},
    )
    return made


def _options(call: LinearCall) -> dict[str, Any]:
    options = {**call.options(0), "BLOCK_D": CHANNELS, "LEVELS": call.chunk.bit_length() - 1}
    del options["DOT"]
    return options
