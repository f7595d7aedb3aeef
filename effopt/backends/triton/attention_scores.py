"""What attention kernels do with a tile: load its lines, score it, find the keys that it needs."""

import triton
import triton.language as tl


@triton.jit
def place_of_program(tiles, parts, span):
    """Tile, part and line of a program. So many lines take turns: first with tile 0 of each, then tile 1."""
    i_first = tl.program_id(0) // (span * tiles * parts) * span
    i = tl.program_id(0) - i_first * tiles * parts
    turns = tl.minimum(span, tl.num_programs(0) // (tiles * parts) - i_first)
    return (i // turns) % tiles, i // (turns * tiles), i_first + i % turns


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
    """Scores in units of ln(2) (or of 1), capped, and the slope of the cap there.

    No hyperbolic tangent is in all targets' language core.
    """
    b_score = b_dot * SCALE
    b_slope = 1.0
    if SOFTCAP != 0.0:
        b_small = tl.exp(tl.abs(b_score) * (-2.0 / SOFTCAP))
        b_tanh = (1.0 - b_small) / (1.0 + b_small)
        b_slope = 1.0 - b_tanh * b_tanh
        b_score = tl.where(b_score < 0.0, -b_tanh, b_tanh) * (SOFTCAP * UNIT)
    return b_score, b_slope


@triton.jit
def open_block(
    p_mask, b_query_ids, p_key_ids, o_t, o_s, m_row, m_s, low, high, anchors, prefix, mask_stride,
    MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr, PREFIX: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Which of `[rows, keys]` mask, ids and band leave open. EDGE: the tile may leave the band."""
    b_open = tl.full([o_t.shape[0], o_s.shape[0]], 1, tl.int1)
    if MASK_OVER_KEYS:
        b_open = b_open & (tl.load(p_mask + o_s.to(tl.int64) * mask_stride, mask=m_s, other=0) != 0)[None, :]
    elif p_mask is not None:
        m_tile, o_far = m_row[:, None] & m_s[None, :], o_s.to(tl.int64)[None, :]
        b_open = tl.load(p_mask + o_far * mask_stride, mask=m_tile, other=0) != 0
    if p_key_ids is not None:
        b_same = b_query_ids[:, None] == tl.load(p_key_ids + o_s, mask=m_s, other=0)[None, :]
        if ANCHORS:
            b_same = b_same | (o_s < anchors)[None, :]
        b_open = b_open & b_same
    if EDGE:
        b_apart = o_s[None, :] - o_t[:, None]
        b_late, b_early = b_apart >= low, b_apart <= high
        if ANCHORS:
            b_late = b_late | (o_s < anchors)[None, :]
        if PREFIX:
            b_early = b_early | (o_s < prefix)[None, :]
        b_open = b_open & b_late & b_early
    return b_open


@triton.jit
def score_block(
    b_query, b_key, p_bias, p_mask, b_query_ids, p_key_ids, o_t, o_s, m_row, m_s, low, high, anchors, prefix,
    bias_stride, mask_stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, FILL: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr, PREFIX: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Scores `[rows, keys]` as the op defines them. EDGE: the tile may leave the band or the keys.

    And, for gradients, the slope of the soft-cap and where a score is that of its query and key.
    """
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
    b_score, b_slope = scale_scores(b_score, SCALE, SOFTCAP, UNIT)
    if p_bias is not None:
        m_tile, o_far = m_row[:, None] & m_s[None, :], o_s.to(tl.int64)[None, :]
        b_score += tl.load(p_bias + o_far * bias_stride, mask=m_tile, other=0.0).to(tl.float32) * UNIT
    b_open = open_block(
        p_mask, b_query_ids, p_key_ids, o_t, o_s, m_row, m_s, low, high, anchors, prefix, mask_stride,
        MASK_OVER_KEYS, ANCHORS, PREFIX, EDGE,
    )  # fmt: skip
    if EDGE or p_mask is not None or p_key_ids is not None:
        b_score = tl.where(b_open, b_score, FILL)
    if EDGE:
        b_real = m_s[None, :]
        if CAUSAL:
            b_real = b_real & (o_s[None, :] <= o_t[:, None])
        b_score = tl.where(b_real, b_score, float("-inf"))
        b_open = b_open & b_real
    return b_score, b_slope, b_open


@triton.jit
def kept_block(p_seed, i_b, o_head, o_t, i_s, DROPOUT: tl.constexpr, KEYS: tl.constexpr):
    """Which weights of `[rows, keys]`, tile `i_s` of keys, dropout keeps: the same in all kernels and tiles.

    The generator counts by (key // 4, query, head, batch), and each of its four words is for one key: all of
    it costs about as much as the products of a tile, and a word a call four times that.
    """
    o_four = i_s * (KEYS // 4) + tl.arange(0, KEYS // 4)
    o_first = o_four[None, :] + (o_t * 0)[:, None]
    o_second, o_third = o_t[:, None] + (o_four * 0)[None, :], o_head[:, None] + (o_four * 0)[None, :]
    b_0, b_1, b_2, b_3 = tl.philox(
        tl.load(p_seed), o_first.to(tl.int32), o_second.to(tl.int32), o_third.to(tl.int32), i_b.to(tl.int32)
    )
    b_word = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (o_t.shape[0], KEYS))
    return tl.uint_to_uniform_float(b_word) >= DROPOUT


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


@triton.jit
def key_tiles(
    t_first, t_last, s, low, high, anchors, prefix, p_mask, b_query_ids, p_key_ids, m_row, mask_stride,
    HIDES: tl.constexpr, CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr,
    PREFIX: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles of keys that some row of queries t_first..t_last may see: (count, lead, gap, first, stop).

    The first `lead` of `count` are those of anchors, and the others `gap` tiles further on. Those from number
    `first` up to `stop` every row sees whole by causality and band.
    """
    first, stop, whole_stop = 0, s, s
    if CAUSAL:
        stop, whole_stop = tl.minimum(stop, t_last + 1), tl.minimum(whole_stop, t_first + 1)
    band_stop, band_whole = t_last + high + 1, t_first + high + 1
    if PREFIX:
        band_stop, band_whole = tl.maximum(band_stop, prefix), tl.maximum(band_whole, prefix)
    if HIDES:
        first, stop = tl.maximum(t_first + low, 0), tl.maximum(tl.minimum(stop, band_stop), 0)
    whole_first, whole_stop = tl.maximum(t_last + low, 0), tl.maximum(tl.minimum(whole_stop, band_whole), 0)
    reach = stop
    if HIDES and (p_key_ids is not None or MASK_OVER_KEYS):
        first, stop = seen_keys(
            first, stop, p_mask, b_query_ids, p_key_ids, m_row, mask_stride, MASK_OVER_KEYS
        )
    # In tiles. Where the band has none, it is empty behind the anchors and not before them.
    first_tile = tl.where(stop > first, first // KEYS, tl.cdiv(reach, KEYS))
    stop = tl.where(stop > first, tl.cdiv(stop, KEYS), first_tile)
    lead = 0
    if HIDES and ANCHORS:
        lead = tl.minimum(tl.cdiv(tl.minimum(anchors, reach), KEYS), first_tile)
    gap = first_tile - lead
    whole_first = tl.minimum(tl.maximum(tl.cdiv(whole_first, KEYS), first_tile), stop)
    whole_stop = tl.minimum(tl.maximum(whole_stop // KEYS, whole_first), stop)
    return stop - gap, lead, gap, whole_first - gap, whole_stop - gap
