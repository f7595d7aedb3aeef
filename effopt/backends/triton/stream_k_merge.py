"""The parts of each line of `stream_k_attention.py`, merged in the order of their programs.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867, section 3.1.
"""

import triton
import triton.language as tl

from effopt.backends.triton.attention_scores import exponential
from effopt.backends.triton.stream_k_schedule import programs_of_line, share_of_tiles, tiles_of_requests

MERGED_ROWS = 4


@triton.jit(do_not_specialize=["t", "batch", "first", "count", "programs"])
def merge_lines_kernel(
    p_sum, p_peak, p_total, p_sinks, p_extents, p_out, p_lse, sink_stride, hkv, group, t, batch,
    first, count, programs,
    UNIT: tl.constexpr, ZERO_ROWS: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, REQUESTS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Merge the parts of some rows of one line, and of their sinks; write the result and its log-sum-exp."""
    o_b = tl.arange(0, REQUESTS)
    _, b_count = tiles_of_requests(p_extents, o_b, batch, first, count)
    row_tiles = tl.cdiv(t * group, ROWS)
    lines = hkv * row_tiles
    share, _ = share_of_tiles(b_count, lines, programs)
    i_line = tl.program_id(0) // (ROWS // MERGED)
    i_b, i_line = i_line // lines, i_line % lines
    i_program, parts = programs_of_line(i_b, i_line, o_b, b_count, lines, share)
    o_in_tile = (tl.program_id(0) % (ROWS // MERGED)) * MERGED + tl.arange(0, MERGED)
    o_row = (i_line % row_tiles) * ROWS + o_in_tile
    m_row = o_row < t * group
    o_t, o_head = o_row // group, (i_line // row_tiles).to(tl.int64) * group + o_row % group
    o_dv = tl.arange(0, BLOCK_DV)
    m_tile = m_row[:, None] & (o_dv < VALUE_HEAD)[None, :]
    b_peak = tl.full([MERGED], float("-inf"), tl.float32)
    b_total = tl.zeros([MERGED], tl.float32)
    if p_sinks is not None:
        # One more score, without a value. Where it is -inf it has no weight.
        b_peak = tl.load(p_sinks + o_head * sink_stride, mask=m_row, other=0.0).to(tl.float32)
        b_total = tl.where(b_peak == float("-inf"), 0.0, 1.0)
    b_sum = tl.zeros([MERGED, BLOCK_DV], tl.float32)
    o_part = (i_program.to(tl.int64) + i_b.to(tl.int64) * lines + i_line) * ROWS + o_in_tile
    for _ in tl.range(0, parts):
        b_part_peak = tl.load(p_peak + o_part, mask=m_row, other=float("-inf"))
        b_part_total = tl.load(p_total + o_part, mask=m_row, other=0.0)
        b_part_sum = tl.load(p_sum + o_part[:, None] * VALUE_HEAD + o_dv[None, :], mask=m_tile, other=0.0)
        b_new = tl.maximum(b_peak, b_part_peak)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink, b_grow = exponential(b_peak - b_base, UNIT), exponential(b_part_peak - b_base, UNIT)
        b_total = b_total * b_shrink + b_part_total * b_grow
        b_sum = b_sum * b_shrink[:, None] + b_part_sum * b_grow[:, None]
        b_peak = b_new
        o_part += ROWS
    b_safe = tl.where(b_total == 0.0, 1.0, b_total)
    b_sum = b_sum / b_safe[:, None]
    if not ZERO_ROWS:
        b_sum = tl.where((b_total == 0.0)[:, None], float("nan"), b_sum)
    o_line = (i_b.to(tl.int64) * hkv * group + o_head) * t + o_t
    tl.store(p_lse + o_line, b_peak * (1.0 / UNIT) + tl.log(b_safe), mask=m_row)
    tl.store(
        p_out + o_line[:, None] * VALUE_HEAD + o_dv[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_tile
    )
