"""What attention kernels do with a tile: load its lines, score it, find the keys that it needs."""

import triton
import triton.language as tl


@triton.jit
def load_lines(p_line, o_column, m_line, line_stride, LENGTH: tl.constexpr, ALL_LINES: tl.constexpr):
    """`[lines, columns]` at pointers to lines, 0 beyond LENGTH columns; ALL_LINES: no line is masked."""
    BLOCK: tl.constexpr = o_column.shape[0]
    p_tile = p_line[:, None] + o_column[None, :] * line_stride
    if ALL_LINES and LENGTH == BLOCK:
        return tl.load(p_tile)
    m_tile = (o_column < LENGTH)[None, :]
    if not ALL_LINES:
        m_tile = m_tile & m_line[:, None]
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def exponential(x, UNIT: tl.constexpr):
    """`exp(x / UNIT * ln 2)` for UNIT of log2(e), else `exp(x)`."""
    if UNIT == 1.0:
        return tl.exp(x)
    return tl.exp2(x)


@triton.jit
def scale_scores(b_dot, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr):
    """Scores in units of ln(2) (or of 1), capped. No hyperbolic tangent is in all targets' language core."""
    b_score = b_dot * SCALE
    if SOFTCAP != 0.0:
        b_small = tl.exp(tl.abs(b_score) * (-2.0 / SOFTCAP))
        b_tanh = (1.0 - b_small) / (1.0 + b_small)
        b_score = tl.where(b_score < 0.0, -b_tanh, b_tanh) * (SOFTCAP * UNIT)
    return b_score


@triton.jit
def score_block(
    b_query, b_key, p_bias, p_mask, b_query_ids, p_key_ids, o_t, o_s, m_row, m_s, t, s, low, high,
    bias_stride, mask_stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, FILL: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores `[rows, keys]` as the op defines them. EDGE: the tile may leave the band or the keys."""
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
    b_score = scale_scores(b_score, SCALE, SOFTCAP, UNIT)
    m_tile, o_far = m_row[:, None] & m_s[None, :], o_s.to(tl.int64)[None, :]
    if p_bias is not None:
        b_score += tl.load(p_bias + o_far * bias_stride, mask=m_tile, other=0.0).to(tl.float32) * UNIT
    if MASK_OVER_KEYS:
        b_mask = tl.load(p_mask + o_s.to(tl.int64) * mask_stride, mask=m_s, other=0)
        b_score = tl.where((b_mask != 0)[None, :], b_score, FILL)
    elif p_mask is not None:
        b_mask = tl.load(p_mask + o_far * mask_stride, mask=m_tile, other=0)
        b_score = tl.where(b_mask != 0, b_score, FILL)
    if p_key_ids is not None:
        b_ids = tl.load(p_key_ids + o_s, mask=m_s, other=0)
        b_score = tl.where(b_query_ids[:, None] == b_ids[None, :], b_score, FILL)
    if EDGE:
        b_apart = o_s[None, :] - o_t[:, None]
        b_score = tl.where((b_apart >= low) & (b_apart <= high), b_score, FILL)
        if CAUSAL:
            b_score = tl.where(b_apart <= 0, b_score, float("-inf"))
        b_score = tl.where(m_s[None, :], b_score, float("-inf"))
    return b_score


@triton.jit
def seen_keys(
    first, stop, p_mask, b_query_ids, p_key_ids, m_row, mask_stride, MASK_OVER_KEYS: tl.constexpr
):  # fmt: skip
    """The first key of [first, stop) that ids and a mask over keys leave open, and the one after the last."""
    SCAN: tl.constexpr = 512
    if p_key_ids is not None:
        least = tl.min(tl.where(m_row, b_query_ids, 2**63 - 1), axis=0)
        most = tl.max(tl.where(m_row, b_query_ids, -(2**63)), axis=0)
    b_first = tl.full([SCAN], 2**31 - 1, tl.int32)
    b_stop = tl.zeros([SCAN], tl.int32)
    for start in tl.range(first, stop, SCAN):
        o_s = start + tl.arange(0, SCAN)
        m_open = o_s < stop
        if p_key_ids is not None:
            b_ids = tl.load(p_key_ids + o_s, mask=m_open, other=0).to(tl.int64)
            m_open = m_open & (b_ids >= least) & (b_ids <= most)
        if MASK_OVER_KEYS:
            m_open = m_open & (tl.load(p_mask + o_s.to(tl.int64) * mask_stride, mask=m_open, other=0) != 0)
        b_first = tl.minimum(b_first, tl.where(m_open, o_s, 2**31 - 1))
        b_stop = tl.maximum(b_stop, tl.where(m_open, o_s + 1, 0))
    stop = tl.minimum(stop, tl.max(b_stop, axis=0))
    return tl.minimum(tl.maximum(first, tl.min(b_first, axis=0)), stop), stop
