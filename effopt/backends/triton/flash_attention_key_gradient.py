"""The gradients of keys and values of attention.

A program holds a tile of keys and values, walks over the tiles of rows that see some of them, those of all
heads of the group, and sums. So nothing is expanded to the heads of the queries, there are no atomics, and
the bits repeat. Which rows see a tile is read off the band; where ids leave only a part, the first and the
last such row are looked up, and a tile that padding masks whole reads no rows.

Reads key and value once, and query and the gradient of the result once for each tile of keys that they see.
Accumulates in float32.

Source: Dao 2023, arXiv:2307.08691, section 3.1, algorithm 2, and the order of its loops, section 3.2. Not
measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.triton.attention_gradients import gradient_block, row_sums, row_tiles_of_keys
from effopt.backends.triton.attention_scores import load_lines, place_of_program, score_block
from effopt.backends.triton.attention_tiles import AttentionCall
from effopt.backends.triton.rows import launch


@triton.jit(do_not_specialize=["t", "s", "low", "high", "anchors", "prefix", "span"])
def key_gradient_kernel(
    p_query, p_key, p_value, p_bias, p_mask, p_query_ids, p_key_ids, p_seed, p_grad, p_peak, p_total, p_delta,
    p_spoiled, p_dkey, p_dvalue, query_strides, key_strides, value_strides, bias_strides, mask_strides,
    query_ids_stride, key_ids_stride, grad_strides, hkv, group, t, s, low, high, anchors, prefix, span,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, FILL: tl.constexpr,
    HIDES: tl.constexpr, CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr,
    PREFIX: tl.constexpr, ZERO_ROWS: tl.constexpr, DROPOUT: tl.constexpr, HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and their values, over the rows of all heads that see them."""
    tiles = tl.cdiv(s, KEYS)
    # The first keys first: under causality most rows see them.
    i_s, _part, i_line = place_of_program(tiles, 1, span)
    i_b, i_hkv = (i_line // hkv).to(tl.int64), (i_line % hkv).to(tl.int64)
    o_s = i_s * KEYS + tl.arange(0, KEYS)
    m_s = o_s < s
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    o_far_s = o_s.to(tl.int64)
    p_line = p_key + i_b * key_strides[0] + i_hkv * key_strides[1] + o_far_s * key_strides[2]
    b_key = load_lines(p_line, o_d, m_s, key_strides[3], HEAD, False).to(DOT)
    p_line = p_value + i_b * value_strides[0] + i_hkv * value_strides[1] + o_far_s * value_strides[2]
    b_value = load_lines(p_line, o_dv, m_s, value_strides[3], VALUE_HEAD, False).to(DOT)
    if p_mask is not None:
        p_mask += i_b * mask_strides[0]
    if p_bias is not None:
        p_bias += i_b * bias_strides[0]
    if p_key_ids is not None:
        p_query_ids += i_b * query_ids_stride
        p_key_ids += i_b * key_ids_stride
    first, stop, whole_first, whole_stop = row_tiles_of_keys(
        i_s, t, s, low, high, anchors, prefix, group, p_mask, p_query_ids, p_key_ids, mask_strides[3],
        HIDES, CAUSAL, MASK_OVER_KEYS, ANCHORS, PREFIX, ROWS, KEYS,
    )  # fmt: skip
    b_dkey = tl.zeros([KEYS, BLOCK_D], tl.float32)
    # NaN where a row that this tile may not read has weights of NaN, as softmax gives to all its keys.
    b_dvalue = tl.zeros([KEYS, BLOCK_DV], tl.float32) + tl.load(p_spoiled + i_line)
    for EDGE in tl.static_range(2):
        whole = whole_stop - whole_first
        for i in tl.range(0, stop - first - whole if EDGE else whole):
            i_tile = whole_first + i
            if EDGE:
                i_tile = first + i + tl.where(first + i >= whole_first, whole, 0)
            o_row = i_tile * ROWS + tl.arange(0, ROWS)
            m_row = o_row < t * group
            o_t, o_head = o_row // group, i_hkv * group + o_row % group
            o_far_t, o_line = o_t.to(tl.int64), (i_b * hkv * group + o_head) * t + o_t
            p_row = p_query + i_b * query_strides[0] + o_head * query_strides[1] + o_far_t * query_strides[2]
            b_query = load_lines(p_row, o_d, m_row, query_strides[3], HEAD, False).to(DOT)
            p_row = p_grad + i_b * grad_strides[0] + o_head * grad_strides[1] + o_far_t * grad_strides[2]
            b_grad = load_lines(p_row, o_dv, m_row, grad_strides[3], VALUE_HEAD, False).to(DOT)
            b_peak, b_inverse, b_delta = row_sums(p_peak, p_total, p_delta, o_line, m_row, ZERO_ROWS)
            p_row_mask, p_row_bias, b_query_ids = p_mask, p_bias, o_t
            if p_mask is not None and not MASK_OVER_KEYS:
                p_row_mask = p_mask + (o_head * mask_strides[1] + o_far_t * mask_strides[2])[:, None]
            if p_bias is not None:
                p_row_bias = p_bias + (o_head * bias_strides[1] + o_far_t * bias_strides[2])[:, None]
            if p_key_ids is not None:
                b_query_ids = tl.load(p_query_ids + o_t, mask=m_row, other=0).to(tl.int64)
            b_score, b_slope, b_open = score_block(
                b_query, b_key, p_row_bias, p_row_mask, b_query_ids, p_key_ids, o_t, o_s, m_row, m_s, low,
                high, anchors, prefix, bias_strides[3], mask_strides[3], SCALE, SOFTCAP, UNIT, FILL, CAUSAL,
                MASK_OVER_KEYS, ANCHORS, PREFIX, EDGE == 1,
            )  # fmt: skip
            b_kept, _, b_by_product = gradient_block(
                b_score, b_slope, b_open, b_grad, b_value, b_peak, b_inverse, b_delta, p_seed, i_b, o_head,
                o_t, i_s, UNIT, DROPOUT, KEYS,
            )  # fmt: skip
            b_dvalue = tl.dot(tl.trans(b_kept.to(DOT)), b_grad, b_dvalue, input_precision="ieee")
            b_dkey = tl.dot(tl.trans(b_by_product.to(DOT)), b_query, b_dkey, input_precision="ieee")
    b_dkey *= SCALE if SOFTCAP != 0.0 else SCALE / UNIT
    o_line = (i_line.to(tl.int64) * s + o_s)[:, None]
    m_key, m_value = m_s[:, None] & (o_d < HEAD)[None, :], m_s[:, None] & (o_dv < VALUE_HEAD)[None, :]
    tl.store(p_dkey + o_line * HEAD + o_d[None, :], b_dkey.to(p_dkey.dtype.element_ty), mask=m_key)
    tl.store(
        p_dvalue + o_line * VALUE_HEAD + o_dv[None, :], b_dvalue.to(p_dvalue.dtype.element_ty), mask=m_value
    )


def _spoiled(call: AttentionCall, total: Tensor) -> Tensor:
    """`[b, hkv]`: NaN where the weights of some row are, else 0."""
    b, hkv, *_ = call.sizes
    lost = total.isnan() if call.zero_masked_rows else total.isnan() | (total == 0.0)
    return total.new_zeros(total.shape).masked_fill(lost, float("nan")).reshape(b, hkv, -1).sum(-1)


def key_gradient(
    call: AttentionCall,
    total: Tensor,
    into_key: Tensor,
    into_value: Tensor,
    read: tuple[Any, ...],
    numbers: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    """Write the gradients of keys and values of a call, contiguous, to `into_key` and `into_value`."""
    b, hkv, group, t, s = call.sizes
    launch(
        key_gradient_kernel,
        b * hkv * triton.cdiv(s, options["KEYS"]),
        call.query,
        *(*read, _spoiled(call, total), into_key, into_value, *numbers),
        call.lines_in_turn(t * group),
        **options,
    )
