"""Attention whose scores never leave the registers. Its gradients are in `flash_attention_backward.py`.

A program holds a tile of rows (queries, and the heads that share their keys), walks over tiles of keys, and
keeps of each row the greatest score so far, the sum of its weights and the weighted sum of values, rescaled
when a greater score comes. Keys that causality or a band hides from all rows of a tile are never loaded;
where ids, or a mask over keys such as that of padding, leave only a part, its first and last key are looked
up first. Tiles inside the band pay for no comparison of indices.

Reads query once, and key and value once for each tile of rows that sees them; writes the result and the
log-sum-exp of each row's scores. Accumulates in float32. A row that sees no key gives what the reference
gives.

Source: Dao et al. 2022, arXiv:2205.14135, algorithm 1; Dao 2023, arXiv:2307.08691, section 3.1; the running
maximum: Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3. Not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering, by_operands
from effopt.backends.triton.attention_refusals import as_given, checked, prepare, supports_training
from effopt.backends.triton.attention_scores import (
    exponential,
    kept_block,
    key_tiles,
    load_lines,
    place_of_program,
    score_block,
)
from effopt.backends.triton.attention_tiles import AttentionCall, attention_cost, row_tiles
from effopt.backends.triton.flash_attention_backward import differentiate, save
from effopt.backends.triton.rows import launch
from effopt.graph import ops
from effopt.graph.ops.base import Operands

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? sinks, Tensor? query_ids, "
    "Tensor? key_ids, float scale, float fill, float softcap, SymInt? low, SymInt? high, bool is_causal, "
    "bool zero_masked_rows, bool rows_see_key, SymInt? anchors, SymInt? prefix) -> (Tensor, Tensor)"
)
TRAINING_SCHEMA = SCHEMA.replace(") ->", ", float dropout_p, Tensor? seed) ->").replace(
    "-> (Tensor, Tensor)", "-> (Tensor, Tensor, Tensor, Tensor)"
)


# What changes from step to step of a decode compiles nothing anew.
@triton.jit(do_not_specialize=["t", "s", "low", "high", "anchors", "prefix", "parts", "span"])
def attention_kernel(
    p_query, p_key, p_value, p_bias, p_mask, p_sinks, p_query_ids, p_key_ids, p_seed, p_out, p_lse, p_peak,
    p_total, p_redo, query_strides, key_strides, value_strides, bias_strides, mask_strides, query_ids_stride,
    key_ids_stride, sink_stride, hkv, group, t, s, low, high, anchors, prefix, parts, span,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, FILL: tl.constexpr,
    HIDES: tl.constexpr, CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr,
    PREFIX: tl.constexpr, ZERO_ROWS: tl.constexpr, DROPOUT: tl.constexpr, HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of rows over its keys, or over one of so many parts of them.

    With p_lse it writes the result and its log-sum-exp; without, in float32 and for each part, the weighted
    sum of values. With p_peak and p_total, the greatest score, in units of UNIT, and the sum of weights.
    With p_redo, only for rows that it marks.
    """
    tiles = tl.cdiv(t * group, ROWS)
    # The last queries first: under causality they see most keys, and should not begin when all others end.
    i_tile, i_split, i_line = place_of_program(tiles, parts, span)
    i_tile = tiles - 1 - i_tile
    i_b, i_hkv = (i_line // hkv).to(tl.int64), (i_line % hkv).to(tl.int64)
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < t * group
    o_t, o_head = o_row // group, i_hkv * group + o_row % group
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    if p_redo is not None:
        b_redo = tl.load(p_redo + (i_b * hkv * group + o_head) * t + o_t, mask=m_row, other=0)
        m_row = b_redo != 0
        if tl.max(b_redo, axis=0) == 0:
            return

    p_row = p_query + i_b * query_strides[0] + o_head * query_strides[1] + o_t.to(tl.int64) * query_strides[2]
    b_query = load_lines(p_row, o_d, m_row, query_strides[3], HEAD, False).to(DOT)
    p_key += i_b * key_strides[0] + i_hkv * key_strides[1]
    p_value += i_b * value_strides[0] + i_hkv * value_strides[1]
    if p_mask is not None:
        p_mask += i_b * mask_strides[0]
        if not MASK_OVER_KEYS:
            p_mask += (o_head * mask_strides[1] + o_t.to(tl.int64) * mask_strides[2])[:, None]
    if p_bias is not None:
        p_bias += (
            i_b * bias_strides[0] + (o_head * bias_strides[1] + o_t.to(tl.int64) * bias_strides[2])[:, None]
        )
    b_query_ids = o_t
    if p_key_ids is not None:
        p_key_ids += i_b * key_ids_stride
        b_query_ids = tl.load(p_query_ids + i_b * query_ids_stride + o_t, mask=m_row, other=0).to(tl.int64)

    t_first, t_last = (i_tile * ROWS) // group, tl.minimum((i_tile * ROWS + ROWS - 1) // group, t - 1)
    stop, lead, gap, whole_first, whole_stop = key_tiles(
        t_first, t_last, s, low, high, anchors, prefix, p_mask, b_query_ids, p_key_ids, m_row,
        mask_strides[3], HIDES, CAUSAL, MASK_OVER_KEYS, ANCHORS, PREFIX, KEYS,
    )  # fmt: skip
    first = 0
    if p_lse is None:
        part = tl.cdiv(stop, parts)
        first = tl.minimum(i_split * part, stop)
        stop = tl.minimum(first + part, stop)
        whole_first = tl.minimum(tl.maximum(whole_first, first), stop)
        whole_stop = tl.minimum(tl.maximum(whole_stop, whole_first), stop)

    b_peak = tl.full([ROWS], float("-inf"), tl.float32)
    b_total = tl.zeros([ROWS], tl.float32)
    if p_sinks is not None:
        # One more score, seen by the first part. Where it is -inf it has no weight.
        b_sink = tl.load(p_sinks + o_head * sink_stride, mask=m_row, other=0.0).to(tl.float32)
        b_peak = tl.where(i_split == 0, b_sink, b_peak)
        b_total = tl.where(b_peak == float("-inf"), 0.0, 1.0)
    b_sum = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    o_key = tl.arange(0, KEYS).to(tl.int64)
    # First the whole tiles, then what is ragged on both sides of them: the order of keys does not matter.
    for EDGE in tl.static_range(2):
        count = stop - first - (whole_stop - whole_first) if EDGE else whole_stop - whole_first
        for i in tl.range(0, count):
            if EDGE:
                i_s = first + i + tl.where(first + i >= whole_first, whole_stop - whole_first, 0)
                i_s += tl.where(i_s >= lead, gap, 0)
            else:
                i_s = whole_first + gap + i
            o_s = i_s * KEYS + tl.arange(0, KEYS)
            m_s = o_s < s
            # The tile's address as one number, so that what differs between threads stays the same.
            i_key = i_s.to(tl.int64) * KEYS
            p_line = (p_key + i_key * key_strides[2]) + o_key * key_strides[2]
            b_key = load_lines(p_line, o_d, m_s, key_strides[3], HEAD, EDGE == 0).to(DOT)
            b_score, _, _ = score_block(
                b_query, b_key, p_bias, p_mask, b_query_ids, p_key_ids, o_t, o_s, m_row, m_s, low, high,
                anchors, prefix, bias_strides[3], mask_strides[3], SCALE, SOFTCAP, UNIT, FILL, CAUSAL,
                MASK_OVER_KEYS, ANCHORS, PREFIX, EDGE == 1,
            )  # fmt: skip
            b_new = tl.maximum(b_peak, tl.max(b_score, axis=1))
            # Finite, so that a row without a key so far gets weights of 0 and not exp(-inf + inf).
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_weight = exponential(b_score - b_base[:, None], UNIT)
            b_shrink = exponential(b_peak - b_base, UNIT)
            b_total = b_total * b_shrink + tl.sum(b_weight, axis=1)
            if DROPOUT != 0.0:
                b_weight = tl.where(kept_block(p_seed, i_b, o_head, o_t, i_s, DROPOUT, KEYS), b_weight, 0.0)
            p_line = (p_value + i_key * value_strides[2]) + o_key * value_strides[2]
            b_value = load_lines(p_line, o_dv, m_s, value_strides[3], VALUE_HEAD, EDGE == 0).to(DOT)
            b_sum = b_sum * b_shrink[:, None]
            b_sum = tl.dot(b_weight.to(DOT), b_value, b_sum, input_precision="ieee")
            b_peak = b_new

    o_line = (i_b * hkv * group + o_head) * t + o_t
    heads = (tl.num_programs(0) // (tiles * parts)).to(tl.int64) * group
    o_line += i_split * heads * t
    m_out = m_row[:, None] & (o_dv < VALUE_HEAD)[None, :]
    if p_peak is not None:
        tl.store(p_peak + o_line, b_peak, mask=m_row)
        tl.store(p_total + o_line, b_total, mask=m_row)
    if p_lse is not None:
        b_safe = tl.where(b_total == 0.0, 1.0, b_total)
        # All are dropped by a probability of 1, and nothing is scaled then.
        b_sum = b_sum / (b_safe * (1.0 if DROPOUT == 1.0 else 1.0 - DROPOUT))[:, None]
        if not ZERO_ROWS:
            b_sum = tl.where((b_total == 0.0)[:, None], float("nan"), b_sum)
        tl.store(p_lse + o_line, b_peak * (1.0 / UNIT) + tl.log(b_safe), mask=m_row)
    tl.store(
        p_out + o_line[:, None] * VALUE_HEAD + o_dv[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_out
    )


def outputs(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The result and the log-sum-exp of a call, unwritten."""
    query = call.query
    out = query.new_empty((*query.shape[:-1], call.value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


def attend(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor | None,
    peak: Tensor | None = None,
    total: Tensor | None = None,
    parts: int = 1,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    redo: Tensor | None = None,
) -> None:
    """Launch the kernel on a call with rows. In parts, `out`, `peak` and `total` take (o, m, l); no `lse`.

    With `redo`, int8 `[b, h, t]`, only rows where it is not 0 are written.
    """
    launch(
        attention_kernel,
        parts * call.row_tiles,
        out,
        *(*call.tensors(), seed, out, lse, peak, total, redo),
        *(*call.numbers(), parts, call.lines_in_turn(call.key.shape[2]) if parts == 1 else 1),
        **call.options(),
        ZERO_ROWS=call.zero_masked_rows,
        DROPOUT=dropout_p,
    )


def _all_outputs(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of a call, and what its backward pass reads: greatest scores and sums of weights."""
    out, lse = outputs(call)
    return out, lse, torch.empty_like(lse), torch.empty_like(lse)


@torch.library.custom_op("effopt_triton::flash_attention", mutates_args=(), schema=TRAINING_SCHEMA)
def _flash_attention(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given_, dropout_p, seed = given
    call = checked(*given_)
    out, lse, peak, total = _all_outputs(call)
    if out.numel() > 0:
        attend(call, out, lse, peak, total, dropout_p=dropout_p, seed=seed)
    return out, lse, peak, total


@_flash_attention.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _all_outputs(AttentionCall(*given[:-2]))


_flash_attention.register_autograd(differentiate, setup_context=save)


@by_operands(ops.attention)
def flash_attention(operands: Operands) -> Tensor:
    """`ops.attention` by one kernel; arguments as there, of any strides, up to float32.

    Dropout draws its seed from torch's generator of the device, and another mask than SDPA would of it.
    """
    given, dropout_p = prepare(operands, drops=True), operands["dropout_p"]
    seed = torch.randint(0, 2**63 - 1, (1,), device=given[0].device) if dropout_p else None
    return as_given(_flash_attention(*given, dropout_p, seed)[0], operands)


FLASH_ATTENTION = Lowering(
    ops.attention,
    "triton",
    flash_attention,
    supports_training,
    attention_cost(row_tiles, launches=1),
)
