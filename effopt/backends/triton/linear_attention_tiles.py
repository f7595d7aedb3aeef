"""What the kernels of linear attention do with the tokens of a chunk: decay between them, values, gradients.

Logarithms of decay are summed and never subtracted: a decay of -inf gives no NaN, and a strong one takes no
digits of a weak one behind it.
"""

import triton
import triton.language as tl

from effopt.backends.triton.attention_scores import load_lines


@triton.jit
def chunk_of_program(blocks, chunks, h):
    """Which block, chunk, line (a head of a batch entry), batch entry and head a program takes."""
    i_block, i_chunk = tl.program_id(0) % blocks, (tl.program_id(0) // blocks) % chunks
    i_line = (tl.program_id(0) // (blocks * chunks)).to(tl.int64)
    return i_block, i_chunk, i_line, i_line // h, i_line % h


@triton.jit
def between_block(b_decay, CHUNK: tl.constexpr):
    """Decay between tokens of a chunk `[query, key]`, 1 ahead of the query."""
    o_row = tl.arange(0, CHUNK)
    b_later = tl.where(o_row[:, None] > o_row[None, :], b_decay[:, None], 0.0)
    return tl.exp(tl.cumsum(b_later, axis=0))


@triton.jit
def end_block(p_gate, stride, m_t, CHUNK: tl.constexpr):
    """Decay from each token of a chunk to its end `[key]`: that of the tokens behind it, its own left out."""
    # m_t of the token behind is m_t with one row fewer: rows that are there come first.
    m_behind = tl.arange(0, CHUNK) + 1 < tl.sum(m_t.to(tl.int32), axis=0)
    b_behind = tl.load(p_gate + stride, mask=m_behind, other=0.0).to(tl.float32)
    return tl.exp(tl.cumsum(b_behind, axis=0, reverse=True))


@triton.jit
def load_gates(p_gate, i_chunk, o_d, t, token_stride, HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """Gates of a chunk's tokens `[CHUNK, d]`, and of the token behind each; 0 behind the chunk's last."""
    o_row = tl.arange(0, CHUNK)
    o_t = i_chunk * CHUNK + o_row
    p_line, m_behind = p_gate + o_t.to(tl.int64) * token_stride, (o_t + 1 < t) & (o_row < CHUNK - 1)
    b_gate = load_lines(p_line, o_d, o_t < t, 1, HEAD, False)
    b_behind = load_lines(p_line + token_stride, o_d, m_behind, 1, HEAD, False)
    return b_gate.to(tl.float32), b_behind.to(tl.float32)


@triton.jit
def left_block(b_gate, b_behind, SIZE: tl.constexpr):
    """What gates leave in segments of SIZE tokens: at each token of what came before its segment, and of each
    token at the end of its segment. Arguments as `load_gates` gives them.
    """
    CHUNK: tl.constexpr = b_gate.shape[0]
    WIDTH: tl.constexpr = b_gate.shape[1]
    b_behind = tl.where((tl.arange(0, CHUNK) % SIZE < SIZE - 1)[:, None], b_behind, 0.0)
    b_since = tl.cumsum(tl.reshape(b_gate, (CHUNK // SIZE, SIZE, WIDTH)), axis=1)
    b_until = tl.cumsum(tl.reshape(b_behind, (CHUNK // SIZE, SIZE, WIDTH)), axis=1, reverse=True)
    return tl.exp(tl.reshape(b_since, (CHUNK, WIDTH))), tl.exp(tl.reshape(b_until, (CHUNK, WIDTH)))


@triton.jit
def store_weighed(
    b_out, b_weight, p_value, p_out, o_t, o_dv, m_t, dv, value_strides,
    REVERSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write `out + weight @ value` of a chunk's tokens, for columns `o_dv` of the value."""
    CHUNK: tl.constexpr = b_weight.shape[0]
    o_row, o_far, m_tile = tl.arange(0, CHUNK), o_t.to(tl.int64), m_t[:, None] & (o_dv < dv)[None, :]
    p_tile = p_value + o_far[:, None] * value_strides[2] + o_dv[None, :] * value_strides[3]
    b_value = tl.load(p_tile, mask=m_tile, other=0.0)
    if not REVERSE:
        # 0 * infinity is NaN: a value that is not finite is taken out, and its columns are NaN from it on.
        m_finite = tl.abs(b_value.to(tl.float32)) < float("inf")
        o_spoilt = tl.min(tl.where(m_finite, CHUNK, o_row[:, None]), axis=0)
        b_value = tl.where(m_finite, b_value, 0.0)
        b_out = tl.where(o_row[:, None] >= o_spoilt[None, :], float("nan"), b_out)
    b_out = tl.dot(b_weight.to(WIDE), b_value.to(WIDE), b_out, input_precision="ieee")
    tl.store(p_out + o_far[:, None] * dv + o_dv[None, :], b_out.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def gradient_products(
    p_grad, p_value, p_state, p_dstate, o_far, o_d, m_t, dv, grad_strides, value_strides,
    HEAD: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums over columns of the value: grad @ value^T, grad @ state^T, value @ dstate^T, state * dstate."""
    CHUNK: tl.constexpr = o_far.shape[0]
    BLOCK_D: tl.constexpr = o_d.shape[0]
    b_pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_dquery = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    b_dkey = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    b_through = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.range(0, tl.cdiv(dv, BLOCK_DV)):
        o_dv = i * BLOCK_DV + tl.arange(0, BLOCK_DV)
        m_dv = (o_dv < dv)[None, :]
        m_tile, m_state = m_t[:, None] & m_dv, (o_d < HEAD)[:, None] & m_dv
        p_tile = p_grad + o_far[:, None] * grad_strides[2] + o_dv[None, :] * grad_strides[3]
        b_grad = tl.load(p_tile, mask=m_tile, other=0.0).to(WIDE)
        p_tile = p_value + o_far[:, None] * value_strides[2] + o_dv[None, :] * value_strides[3]
        b_value = tl.load(p_tile, mask=m_tile, other=0.0).to(WIDE)
        o_state = o_d[:, None] * dv + o_dv[None, :]
        b_state = tl.load(p_state + o_state, mask=m_state, other=0.0)
        b_dstate = tl.load(p_dstate + o_state, mask=m_state, other=0.0)
        b_through += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), axis=1)
        b_pairs = tl.dot(b_grad, tl.trans(b_value), b_pairs, input_precision="ieee")
        b_dquery = tl.dot(b_grad, tl.trans(b_state.to(WIDE)), b_dquery, input_precision="ieee")
        b_dkey = tl.dot(b_value, tl.trans(b_dstate.to(WIDE)), b_dkey, input_precision="ieee")
    return b_pairs, b_dquery, b_dkey, b_through
