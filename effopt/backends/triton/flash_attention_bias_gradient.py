"""The gradient of a bias that was added to attention scores, whatever it is broadcast over.

A program owns one tile of the bias and walks over all that the tile was added to: batch entries and heads
where the bias has one for all, and the tiles of rows or keys where it has one row or one key. It computes the
scores' gradient there as the other backward kernels do, and sums. Two products of a tile, beside theirs, and
paid only where the bias wants a gradient; no scores `[b, h, t, s]` are written, no atomics, and the bits
repeat. Tiles outside the band are passed over.

A bias that is broadcast over rows and keys has few tiles, and few programs: right, and not fast.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.triton.attention_gradients import gradient_block, row_sums
from effopt.backends.triton.attention_scores import load_lines, score_block
from effopt.backends.triton.attention_tiles import AttentionCall
from effopt.backends.triton.rows import launch


@triton.jit(do_not_specialize=["t", "s", "low", "high", "anchors", "prefix"])
def bias_gradient_kernel(
    p_query, p_key, p_value, p_bias, p_mask, p_query_ids, p_key_ids, p_seed, p_grad, p_peak, p_total, p_delta,
    p_dbias, query_strides, key_strides, value_strides, bias_strides, mask_strides, query_ids_stride,
    key_ids_stride, grad_strides, hkv, group, t, s, low, high, anchors, prefix, b, bias_b, bias_h,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, FILL: tl.constexpr,
    HIDES: tl.constexpr, CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr,
    PREFIX: tl.constexpr, ZERO_ROWS: tl.constexpr, DROPOUT: tl.constexpr, HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr, ONE_ROW: tl.constexpr, ONE_KEY: tl.constexpr,
):  # fmt: skip
    """One tile of the bias: rows of one head, and keys."""
    t_tiles, s_tiles, h = tl.cdiv(t, ROWS), tl.cdiv(s, KEYS), hkv * group
    # Tiles of the bias, and of what each of them was added to.
    t_own, s_own = 1 if ONE_ROW else t_tiles, 1 if ONE_KEY else s_tiles
    t_over, s_over = t_tiles // t_own, s_tiles // s_own
    i_tile = tl.program_id(0)
    i_own_s, i_own_t = i_tile % s_own, i_tile // s_own % t_own
    i_own_h, i_own_b = i_tile // s_own // t_own % bias_h, i_tile // s_own // t_own // bias_h
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_dbias = tl.zeros([ROWS, KEYS], tl.float32)
    for i in tl.range(0, (b // bias_b) * (h // bias_h) * t_over * s_over):
        i_s, i_t = i_own_s + i % s_over, i_own_t + i // s_over % t_over
        i_head = (i_own_h + i // s_over // t_over % (h // bias_h)).to(tl.int64)
        i_b = (i_own_b + i // s_over // t_over // (h // bias_h)).to(tl.int64)
        o_t, o_s = i_t * ROWS + tl.arange(0, ROWS), i_s * KEYS + tl.arange(0, KEYS)
        farthest, nearest = i_s * KEYS + KEYS - 1 - i_t * ROWS, i_s * KEYS - (i_t * ROWS + ROWS - 1)
        late, early = farthest >= low, nearest <= high
        if ANCHORS:
            late = late | (i_s * KEYS < anchors)
        if PREFIX:
            early = early | (i_s * KEYS < prefix)
        seen = (late & early) if HIDES else True
        if CAUSAL:
            seen = seen & (nearest <= 0)
        if seen:
            m_row, m_s = o_t < t, o_s < s
            o_far_t, o_far_s = o_t.to(tl.int64), o_s.to(tl.int64)
            o_head, o_line = o_t * 0 + i_head, (i_b * h + i_head) * t + o_t
            p_line = p_query + i_b * query_strides[0] + i_head * query_strides[1] + o_far_t * query_strides[2]
            b_query = load_lines(p_line, o_d, m_row, query_strides[3], HEAD, False).to(DOT)
            p_line = p_grad + i_b * grad_strides[0] + i_head * grad_strides[1] + o_far_t * grad_strides[2]
            b_grad = load_lines(p_line, o_dv, m_row, grad_strides[3], VALUE_HEAD, False).to(DOT)
            i_hkv = i_head // group
            p_line = p_key + i_b * key_strides[0] + i_hkv * key_strides[1] + o_far_s * key_strides[2]
            b_key = load_lines(p_line, o_d, m_s, key_strides[3], HEAD, False).to(DOT)
            p_line = p_value + i_b * value_strides[0] + i_hkv * value_strides[1] + o_far_s * value_strides[2]
            b_value = load_lines(p_line, o_dv, m_s, value_strides[3], VALUE_HEAD, False).to(DOT)
            b_peak, b_inverse, b_delta = row_sums(p_peak, p_total, p_delta, o_line, m_row, ZERO_ROWS)
            p_row_bias = p_bias + i_b * bias_strides[0] + i_head * bias_strides[1]
            p_row_bias += (o_far_t * bias_strides[2])[:, None]
            p_row_mask, p_row_key_ids, b_query_ids = p_mask, p_key_ids, o_t
            if p_mask is not None:
                p_row_mask = p_mask + i_b * mask_strides[0]
                if not MASK_OVER_KEYS:
                    p_row_mask += (i_head * mask_strides[1] + o_far_t * mask_strides[2])[:, None]
            if p_key_ids is not None:
                p_row_key_ids = p_key_ids + i_b * key_ids_stride
                p_line = p_query_ids + i_b * query_ids_stride + o_t
                b_query_ids = tl.load(p_line, mask=m_row, other=0).to(tl.int64)
            b_score, b_slope, b_open = score_block(
                b_query, b_key, p_row_bias, p_row_mask, b_query_ids, p_row_key_ids, o_t, o_s, m_row, m_s, low,
                high, anchors, prefix, bias_strides[3], mask_strides[3], SCALE, SOFTCAP, UNIT, FILL, CAUSAL,
                MASK_OVER_KEYS, ANCHORS, PREFIX, True,
            )  # fmt: skip
            _, b_by_score, _ = gradient_block(
                b_score, b_slope, b_open, b_grad, b_value, b_peak, b_inverse, b_delta, p_seed, i_b, o_head,
                o_t, i_s, UNIT, DROPOUT, KEYS,
            )  # fmt: skip
            b_dbias += b_by_score
    o_t, o_s = i_own_t * ROWS + tl.arange(0, ROWS), i_own_s * KEYS + tl.arange(0, KEYS)
    bias_t, bias_s = 1 if ONE_ROW else t, 1 if ONE_KEY else s
    if ONE_ROW:
        b_dbias, o_t = tl.sum(b_dbias, axis=0)[None, :], tl.arange(0, 1)
    if ONE_KEY:
        b_dbias, o_s = tl.sum(b_dbias, axis=1)[:, None], tl.arange(0, 1)
    o_line = (i_own_b.to(tl.int64) * bias_h + i_own_h) * bias_t + o_t
    m_tile = (o_t < bias_t)[:, None] & (o_s < bias_s)[None, :]
    p_tile = p_dbias + o_line[:, None] * bias_s + o_s[None, :]
    tl.store(p_tile, b_dbias.to(p_dbias.dtype.element_ty), mask=m_tile)


def bias_gradient(
    call: AttentionCall,
    into: Tensor,
    read: tuple[Any, ...],
    numbers: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Write the gradient of the bias of a call to `into`, contiguous, of the bias' shape."""
    bias_b, bias_h, bias_t, bias_s = into.shape
    b, _, _, t, s = call.sizes
    rows, keys = (triton.cdiv(n, options[name]) for n, name in ((t, "ROWS"), (s, "KEYS")))
    own = (1 if bias_t == 1 else rows) * (1 if bias_s == 1 else keys)
    launch(
        bias_gradient_kernel,
        bias_b * bias_h * own,
        into,
        *(*read, into, *numbers, b, bias_b, bias_h),
        **options,
        ONE_ROW=bias_t == 1,
        ONE_KEY=bias_s == 1,
    )
