"""What the attention kernels of the backward pass share: their tiles, the gradient of a tile of scores.

With weights w = exp(score - peak) / total, computed again from what the forward pass left of each row, g the
gradient of the result, and `delta` the sum of g * result over a row, which is that of w * (g @ value) too:

    gradient of a score  = w * (g @ value - delta),  0 where the score was replaced or is of no key
    with dropout         = w * (keep * (g @ value) / (1 - p) - delta)

Peak and total are kept, not the log-sum-exp alone: beside the least float32, or any large fill, the logarithm
of a count is lost, and rows whose keys are all filled would get weights of 1.

Source: Dao 2023, arXiv:2307.08691, section 3.1, algorithm 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from effopt.backends.triton.attention_scores import exponential, kept_block, seen_keys
from effopt.backends.triton.attention_tiles import AttentionTile


def backward_tile_for(
    of: str, head: int, dtype: torch.dtype, dense: bool, shared: bool = False
) -> AttentionTile:
    """The tile of the kernel for the gradient `of` query, key or bias; the others as in `tile_for`.

    Sums stay in registers beside scores, weights and their gradients, so tiles are smaller than the
    forward's. What they spill is bounded as there; gfx942 has the least registers.
    """
    wide = triton.next_power_of_2(max(16, head))
    if dtype == torch.float32:
        return AttentionTile(16, 16, 4, 1)
    if wide > 128:
        rows, keys = (16, 16) if dense or of == "bias" else (32, 16) if of == "query" else (16, 32)
    elif of == "bias":
        rows, keys = 32, 16
    elif of == "key" and wide > 64:
        # Operands in shared memory leave registers for the sums of as many keys as matrix units take at once.
        rows, keys = 16 if dense else 32, 64 if shared else 32
    else:
        rows, keys = 32 if dense else 64, 32
    return AttentionTile(rows, keys, 8, 1)


@triton.jit
def row_sums(p_peak, p_total, p_delta, o_line, m_row, ZERO_ROWS: tl.constexpr):
    """Of each row: greatest score, inverse of its sum of weights, delta.

    A line that is no row has weights of 0, and a row that sees no key too, or NaN as softmax gives.
    """
    b_peak = tl.load(p_peak + o_line, mask=m_row, other=float("inf"))
    b_total = tl.load(p_total + o_line, mask=m_row, other=1.0)
    b_peak = tl.where(b_peak == float("-inf"), float("inf"), b_peak)
    b_inverse = 1.0 / tl.where(b_total == 0.0, 1.0, b_total)
    if not ZERO_ROWS:
        b_inverse = tl.where(b_total == 0.0, float("nan"), b_inverse)
    return b_peak, b_inverse, tl.load(p_delta + o_line, mask=m_row, other=0.0)


@triton.jit
def gradient_block(
    b_score, b_slope, b_open, b_grad, b_value, b_peak, b_inverse, b_delta, p_seed, i_b, o_head, o_t, i_s,
    UNIT: tl.constexpr, DROPOUT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Weights that met the values, the gradient of scores, and that of scores before the soft-cap."""
    b_weight = exponential(b_score - b_peak[:, None], UNIT) * b_inverse[:, None]
    b_by_weight = tl.dot(b_grad, tl.trans(b_value), input_precision="ieee")
    b_kept = b_weight
    if DROPOUT != 0.0:
        RAISE: tl.constexpr = 0.0 if DROPOUT == 1.0 else 1.0 / (1.0 - DROPOUT)
        m_kept = kept_block(p_seed, i_b, o_head, o_t, i_s, DROPOUT, KEYS)
        b_kept = tl.where(m_kept, b_weight * RAISE, 0.0)
        b_by_weight = tl.where(m_kept, b_by_weight * RAISE, 0.0)
    # Chosen, not multiplied by 0: a row of NaN has gradients of 0 where it is masked.
    b_by_score = tl.where(b_open, b_weight * (b_by_weight - b_delta[:, None]), 0.0)
    return b_kept, b_by_score, b_by_score * b_slope


@triton.jit
def row_tiles_of_keys(
    i_s, t, s, low, high, anchors, prefix, group, p_mask, p_query_ids, p_key_ids, mask_stride,
    HIDES: tl.constexpr, CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr,
    PREFIX: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles of rows that may see a key of tile `i_s`: (first, stop), and those that see it whole by band."""
    k_first, k_stop = i_s * KEYS, tl.minimum(i_s * KEYS + KEYS, s)
    first, stop, whole_first = 0, t, 0
    if CAUSAL:
        first, whole_first = k_first, k_stop - 1
    band_first, band_stop = k_first - high, k_stop - low
    band_whole_first, whole_stop = k_stop - 1 - high, k_first - low + 1
    if PREFIX:
        band_first = tl.where(k_first < prefix, 0, band_first)
        band_whole_first = tl.where(k_stop <= prefix, 0, band_whole_first)
    if ANCHORS:
        band_stop = tl.where(k_first < anchors, t, band_stop)
        whole_stop = tl.where(k_stop <= anchors, t, whole_stop)
    if HIDES:
        first, stop = tl.maximum(first, band_first), tl.minimum(stop, band_stop)
    whole_first, whole_stop = tl.maximum(whole_first, band_whole_first), tl.minimum(whole_stop, t)
    first, stop = tl.maximum(first, 0), tl.maximum(stop, 0)
    o_s = k_first + tl.arange(0, KEYS)
    m_s = o_s < s
    if HIDES and p_key_ids is not None:
        b_key_ids = tl.load(p_key_ids + o_s, mask=m_s, other=0).to(tl.int64)
        seen_first, seen_stop = seen_keys(first, stop, None, b_key_ids, p_query_ids, m_s, 0, False)
        if ANCHORS:
            seen_first = tl.where(k_first < anchors, first, seen_first)
            seen_stop = tl.where(k_first < anchors, stop, seen_stop)
        first, stop = seen_first, seen_stop
    if HIDES and MASK_OVER_KEYS:
        b_seen = tl.load(p_mask + o_s.to(tl.int64) * mask_stride, mask=m_s, other=0) != 0
        stop = tl.where(tl.max(b_seen.to(tl.int32), axis=0) > 0, stop, 0)
    stop = tl.where(stop > first, tl.cdiv(stop * group, ROWS), 0)
    first = tl.minimum(first * group // ROWS, stop)
    whole_first = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(whole_first, 0) * group, ROWS), first), stop)
    whole_stop = tl.minimum(tl.maximum(tl.maximum(whole_stop, 0) * group // ROWS, whole_first), stop)
    # Loads of a tile that keys do not fill are masked.
    whole_stop = tl.where(k_first + KEYS <= s, whole_stop, whole_first)
    return first, stop, whole_first, whole_stop
