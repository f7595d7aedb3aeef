"""Linear attention over one token, a decode step: the state is read once and written once.

    state = decay * state + key^T value;    out = query state

A program holds some columns of one head's state in float32. Nothing else is large: each of the other
operands is one row a head. Chunks would read the state twice and write it twice.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, section 3.4. Not measured on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.triton.linear_attention_call import WARPS, LinearCall
from effopt.backends.triton.rows import launch

MAX_HEAD = 256
"""Longest query and key: a program holds whole columns, and with 512 channels spills 80 bytes on sm_80."""
COLUMNS = 16
"""Columns of a state in a program: few, so that one sequence of 32 heads of 128 makes 256 programs."""


@triton.jit
def step_kernel(
    p_query, p_key, p_value, p_decay, p_first, p_out, p_last, query_strides, key_strides, value_strides,
    decay_strides, h, dv,
    SCALE: tl.constexpr, BY_CHANNEL: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The result of one token, and the state behind it, for one block of columns of the value."""
    blocks = tl.cdiv(dv, BLOCK_DV)
    i_line, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    i_b, i_h = i_line // h, i_line % h
    o_d, o_dv = tl.arange(0, BLOCK_D), i_block * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_d, m_dv = o_d < HEAD, o_dv < dv
    m_state = m_d[:, None] & m_dv[None, :]
    o_state = i_line * HEAD * dv + o_d[:, None] * dv + o_dv[None, :]
    p_query += i_b * query_strides[0] + i_h * query_strides[1]
    p_key += i_b * key_strides[0] + i_h * key_strides[1]
    p_value += i_b * value_strides[0] + i_h * value_strides[1]
    b_query = tl.load(p_query + o_d * query_strides[3], mask=m_d, other=0.0).to(tl.float32)
    b_key = tl.load(p_key + o_d * key_strides[3], mask=m_d, other=0.0).to(tl.float32)
    b_value = tl.load(p_value + o_dv * value_strides[3], mask=m_dv, other=0.0).to(tl.float32)
    b_state = b_key[:, None] * b_value[None, :]
    if p_first is not None:
        b_past = tl.load(p_first + o_state, mask=m_state, other=0.0).to(tl.float32)
        if p_decay is not None:
            p_gate = p_decay + i_b * decay_strides[0] + i_h * decay_strides[1]
            if BY_CHANNEL:
                b_past *= tl.exp(tl.load(p_gate + o_d, mask=m_d, other=0.0).to(tl.float32))[:, None]
            else:
                b_past *= tl.exp(tl.load(p_gate).to(tl.float32))
        b_state += b_past
    tl.store(p_last + o_state, b_state, mask=m_state)
    # Padding holds zeros of the key, but 0 * infinity of a value is none.
    b_out = tl.sum(tl.where(m_state, b_query[:, None] * b_state, 0.0), axis=0) * SCALE
    tl.store(p_out + i_line * dv + o_dv, b_out.to(p_out.dtype.element_ty), mask=m_dv)


def run_step(call: LinearCall, out: Tensor) -> Tensor:
    """Write the result of a call of one token to `out`, contiguous, and return the state behind it."""
    b, h, _, d = call.query.shape
    dv = call.value.shape[-1]
    last = call.query.new_empty((b, h, d, dv), dtype=torch.float32)
    launch(
        step_kernel,
        call.lines * triton.cdiv(dv, COLUMNS),
        out,
        *(call.query, call.key, call.value, call.decay, call.state, out, last),
        *(*(x.stride() for x in (call.query, call.key, call.value)), call.decay_strides(), h, dv),
        SCALE=call.scale,
        BY_CHANNEL=call.by_channel,
        HEAD=d,
        BLOCK_D=triton.next_power_of_2(d),
        BLOCK_DV=COLUMNS,
        num_warps=WARPS,
    )
    return last
