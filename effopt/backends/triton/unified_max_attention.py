"""Attention of few rows over many keys, all parts with one maximum, fixed before any score is known.

`decode_attention.py` takes the greatest score of each tile, and rescales what it summed so far. Softmax is
the same whatever is subtracted from the scores, as long as nothing overflows and not all is lost below the
least number. So here every part takes exp(score - PHI): no maximum, no rescaling, and parts are added.

    l = sum(exp(score - PHI)),   o = sum(exp(score - PHI) value) / l

The kernel that adds the parts of a row marks it if its sums are not finite, or if `l` is so small that
weights below the range of their dtype could count; so it does with rows that see no key. The exact kernels,
of `flash_attention.py` and `decode_attention.py`, are then launched in any case, for marked rows alone:
nothing is read on the host, and programs without one return at once.

Source: Hong et al. 2023, FlashDecoding++, arXiv:2311.01282, section 3. There PHI is taken from the scores of
a model, and single scores are compared with bounds. Not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering, by_operands
from effopt.backends.triton.attention_refusals import as_given, checked, prepare, supports
from effopt.backends.triton.attention_scores import exponential, key_tiles, load_lines, score_block
from effopt.backends.triton.attention_tiles import AttentionCall
from effopt.backends.triton.decode_attention import DECODE_ATTENTION, MERGED_ROWS, merge, parts_of
from effopt.backends.triton.flash_attention import SCHEMA, attend, outputs
from effopt.backends.triton.rows import LAUNCH_S, launch
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.target import Target

PHI = 0.0
"""What is subtracted from scores."""
LEAST_MEAN = 2.0**-60
"""Least mean weight of a row: one of less than 2**-126 may become 0, over all keys less than 2**-66 of their
sum, and values down to 2**-66 do not vanish in products with the largest."""
LEAST_MEAN_FLOAT16 = 2.0**-12
"""The same in float16, where a weight below 2**-25 is 0: over all keys that is less than 2**-13 of their sum.
One above 65504 is infinite, so that rows fit whose greatest score is up to 11 above PHI."""


@triton.jit(do_not_specialize=["t", "s", "low", "high", "anchors", "prefix", "parts"])
def unified_max_kernel(
    p_query, p_key, p_value, p_bias, p_mask, p_sinks, p_query_ids, p_key_ids, p_sum, p_total,
    query_strides, key_strides, value_strides, bias_strides, mask_strides, query_ids_stride,
    key_ids_stride, sink_stride, hkv, group, t, s, low, high, anchors, prefix, parts,
    PHI: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, FILL: tl.constexpr,
    HIDES: tl.constexpr, CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr,
    PREFIX: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sums of weights and of weighted values, float32, of one tile of rows over one part of its keys."""
    tiles = tl.cdiv(t * group, ROWS)
    i_tile = tiles - 1 - tl.program_id(0) % tiles
    i_split = (tl.program_id(0) // tiles) % parts
    i_line = tl.program_id(0) // (tiles * parts)
    i_b, i_hkv = (i_line // hkv).to(tl.int64), (i_line % hkv).to(tl.int64)
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < t * group
    o_t, o_head = o_row // group, i_hkv * group + o_row % group
    o_far = o_t.to(tl.int64)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_row = p_query + i_b * query_strides[0] + o_head * query_strides[1] + o_far * query_strides[2]
    b_query = load_lines(p_row, o_d, m_row, query_strides[3], HEAD, False).to(DOT)
    p_key += i_b * key_strides[0] + i_hkv * key_strides[1]
    p_value += i_b * value_strides[0] + i_hkv * value_strides[1]
    if p_mask is not None:
        p_mask += i_b * mask_strides[0]
        if not MASK_OVER_KEYS:
            p_mask += (o_head * mask_strides[1] + o_far * mask_strides[2])[:, None]
    if p_bias is not None:
        p_bias += i_b * bias_strides[0] + (o_head * bias_strides[1] + o_far * bias_strides[2])[:, None]
    b_query_ids = o_t
    if p_key_ids is not None:
        p_key_ids += i_b * key_ids_stride
        b_query_ids = tl.load(p_query_ids + i_b * query_ids_stride + o_t, mask=m_row, other=0).to(tl.int64)
    t_first, t_last = (i_tile * ROWS) // group, tl.minimum((i_tile * ROWS + ROWS - 1) // group, t - 1)
    stop, lead, gap, _first, _stop = key_tiles(
        t_first, t_last, s, low, high, anchors, prefix, p_mask, b_query_ids, p_key_ids, m_row,
        mask_strides[3], HIDES, CAUSAL, MASK_OVER_KEYS, ANCHORS, PREFIX, KEYS,
    )  # fmt: skip
    part = tl.cdiv(stop, parts)
    first = tl.minimum(i_split * part, stop)

    b_total = tl.zeros([ROWS], tl.float32)
    if p_sinks is not None:
        b_sink = tl.load(p_sinks + o_head * sink_stride, mask=m_row, other=0.0).to(tl.float32)
        b_total = tl.where(i_split == 0, exponential(b_sink - PHI, UNIT), 0.0)
    b_sum = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    o_key = tl.arange(0, KEYS).to(tl.int64)
    for i in tl.range(first, tl.minimum(first + part, stop)):
        i_s = i + tl.where(i >= lead, gap, 0)
        o_s = i_s * KEYS + tl.arange(0, KEYS)
        m_s = o_s < s
        i_key = i_s.to(tl.int64) * KEYS
        p_line = (p_key + i_key * key_strides[2]) + o_key * key_strides[2]
        b_key = load_lines(p_line, o_d, m_s, key_strides[3], HEAD, False).to(DOT)
        b_score, _, _ = score_block(
            b_query, b_key, p_bias, p_mask, b_query_ids, p_key_ids, o_t, o_s, m_row, m_s, low, high,
            anchors, prefix, bias_strides[3], mask_strides[3], SCALE, SOFTCAP, UNIT, FILL, CAUSAL,
            MASK_OVER_KEYS, ANCHORS, PREFIX, True,
        )  # fmt: skip
        b_weight = exponential(b_score - PHI, UNIT)
        b_total += tl.sum(b_weight, axis=1)
        p_line = (p_value + i_key * value_strides[2]) + o_key * value_strides[2]
        b_value = load_lines(p_line, o_dv, m_s, value_strides[3], VALUE_HEAD, False).to(DOT)
        b_sum = tl.dot(b_weight.to(DOT), b_value, b_sum, input_precision="ieee")

    lines = (tl.num_programs(0) // (tiles * parts)).to(tl.int64)
    o_line = (i_split * lines * group + i_b * hkv * group + o_head) * t + o_t
    m_sum = m_row[:, None] & (o_dv < VALUE_HEAD)[None, :]
    tl.store(p_total + o_line, b_total, mask=m_row)
    tl.store(p_sum + o_line[:, None] * VALUE_HEAD + o_dv[None, :], b_sum, mask=m_sum)


@triton.jit(do_not_specialize=["rows", "parts", "s"])
def add_parts_kernel(
    p_sum, p_total, p_redo, p_out, p_lse, rows, parts, s, dv,
    PHI: tl.constexpr, LEAST: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add `[parts, rows, dv]` up, divide, and mark the rows that one maximum did not fit."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_dv = tl.arange(0, BLOCK_DV)
    m_row = o_row < rows
    m_tile = m_row[:, None] & (o_dv < dv)[None, :]
    b_total = tl.zeros([ROWS], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    o_part = o_row
    for _ in tl.range(0, parts):
        b_total += tl.load(p_total + o_part, mask=m_row, other=0.0)
        b_sum += tl.load(p_sum + o_part[:, None] * dv + o_dv[None, :], mask=m_tile, other=0.0)
        o_part += rows
    # Comparisons of NaN are false, so what is not a number does not fit.
    b_finite = tl.min((tl.abs(b_sum) < float("inf")).to(tl.int32), axis=1)
    b_fits = (b_finite != 0) & (b_total >= s * LEAST) & (b_total < float("inf"))
    b_safe = tl.where(b_fits, b_total, 1.0)
    tl.store(p_redo + o_row, tl.where(b_fits, 0, 1).to(tl.int8), mask=m_row)
    tl.store(p_lse + o_row, PHI / UNIT + tl.log(b_safe), mask=m_row)
    b_out = b_sum / b_safe[:, None]
    tl.store(p_out + o_row[:, None] * dv + o_dv[None, :], b_out.to(p_out.dtype.element_ty), mask=m_tile)


def attend_unified(
    call: AttentionCall, out: Tensor, lse: Tensor, sums: Tensor, total: Tensor, redo: Tensor
) -> None:
    """Walk in `len(sums)` parts and add them up into `out` and `lse`; `redo` marks rows to do exactly."""
    options = call.options()
    phi = PHI * options["UNIT"]
    launch(
        unified_max_kernel,
        len(sums) * call.row_tiles,
        out,
        *(*call.tensors(), sums, total, *call.numbers(), len(sums)),
        PHI=phi,
        **options,
    )
    launch(
        add_parts_kernel,
        triton.cdiv(lse.numel(), MERGED_ROWS),
        out,
        *(sums, total, redo, out, lse, lse.numel(), len(sums), call.key.shape[2], out.shape[-1]),
        PHI=phi,
        LEAST=LEAST_MEAN_FLOAT16 if out.dtype == torch.float16 else LEAST_MEAN,
        UNIT=options["UNIT"],
        ROWS=MERGED_ROWS,
        BLOCK_DV=options["BLOCK_DV"],
    )


@torch.library.custom_op("effopt_triton::unified_max_attention", mutates_args=(), schema=SCHEMA)
def _unified_max_attention(*given: Any) -> tuple[Tensor, Tensor]:
    call = checked(*given)
    out, lse = outputs(call)
    divided = parts_of(call) if out.numel() > 0 else 0
    if divided == 1:
        attend(call, out, lse)
    if divided <= 1:
        return out, lse
    sums = out.new_empty((divided, *out.shape), dtype=torch.float32)
    peak, total = (out.new_empty((divided, *lse.shape), dtype=torch.float32) for _ in range(2))
    redo = torch.empty(lse.shape, dtype=torch.int8, device=lse.device)
    attend_unified(call, out, lse, sums, total, redo)
    attend(call, sums, None, peak, total, divided, redo=redo)
    merge(sums, peak, total, out, lse, call.options()["UNIT"], call.zero_masked_rows, redo)
    return out, lse


@_unified_max_attention.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    return outputs(AttentionCall(*given))


@by_operands(ops.attention)
def unified_max_attention(operands: Operands) -> Tensor:
    """`ops.attention` with one maximum, exactly where it does not fit; arguments as of `flash_attention`."""
    return as_given(_unified_max_attention(*prepare(operands))[0], operands)


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """More than that of `triton-divided`, which it is to be measured against: two more launches."""
    return DECODE_ATTENTION.cost(target, operands, result) + 2 * LAUNCH_S


UNIFIED_MAX_ATTENTION = Lowering(
    ops.attention, "triton-unified-max", unified_max_attention, supports, _cost, differentiable=False
)
