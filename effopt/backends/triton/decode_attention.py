"""Attention of few rows over many keys: the keys are divided among programs, and their parts merged.

A program of the first kernel, that of `flash_attention.py`, walks over one part of the keys that its rows see
and writes, in float32, the weighted sum of values, the greatest score and the sum of weights: (o, m, l). Two
such triples merge into that of both parts, in any grouping:

    m = max(m1, m2),   l = l1 exp(m1 - m) + l2 exp(m2 - m),   o = o1 exp(m1 - m) + o2 exp(m2 - m)

A second kernel merges all parts of a row, always in the same order, and divides: no atomics, and the bits
repeat. Weights and sums are kept, not the log-sum-exp alone, for beside the least float32, which a row whose
keys are all filled has for its greatest score, the logarithm of a count is lost.

Source: Dao et al. 2023, Flash-Decoding (crfm.stanford.edu/2023/10/12/flashdecoding.html); the merge: Milakov
& Gimelshein 2018, arXiv:1805.02867, section 3.1. Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering, by_operands
from effopt.backends.triton.attention_refusals import as_given, checked, prepare, supports
from effopt.backends.triton.attention_scores import exponential
from effopt.backends.triton.attention_tiles import (
    PROGRAMS,
    AttentionCall,
    attention_cost,
    row_tiles,
    share_of_keys,
)
from effopt.backends.triton.flash_attention import SCHEMA, attend, outputs
from effopt.backends.triton.rows import launch
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint
from effopt.target import Target

LEAST_KEYS = 256
"""Keys that a part has at least: a program with fewer takes longer to begin and to be merged than to read."""
MERGED_ROWS = 4
"""Rows that a program of the merge holds. They are few, and a row is one head's."""


def parts(row_tiles: float, keys: int) -> int:
    """Parts that keys are divided into: enough programs to fill a GPU, and none with few keys."""
    return max(1, min(keys // LEAST_KEYS, int(PROGRAMS // max(1.0, row_tiles))))


@triton.jit
def merge_parts_kernel(
    p_sum, p_peak, p_total, p_redo, p_out, p_lse, rows, parts, dv,
    UNIT: tl.constexpr, ZERO_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge `[parts, rows, dv]` into the result `[rows, dv]` and its log-sum-exp `[rows]`.

    With p_redo, only rows that it marks.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_dv = tl.arange(0, BLOCK_DV)
    m_row = o_row < rows
    if p_redo is not None:
        b_redo = tl.load(p_redo + o_row, mask=m_row, other=0)
        m_row = b_redo != 0
        if tl.max(b_redo, axis=0) == 0:
            return
    m_tile = m_row[:, None] & (o_dv < dv)[None, :]
    b_peak = tl.full([ROWS], float("-inf"), tl.float32)
    b_total = tl.zeros([ROWS], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    o_part = o_row
    for _ in tl.range(0, parts):
        b_part_peak = tl.load(p_peak + o_part, mask=m_row, other=float("-inf"))
        b_part_total = tl.load(p_total + o_part, mask=m_row, other=0.0)
        b_part_sum = tl.load(p_sum + o_part[:, None] * dv + o_dv[None, :], mask=m_tile, other=0.0)
        b_new = tl.maximum(b_peak, b_part_peak)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink, b_grow = exponential(b_peak - b_base, UNIT), exponential(b_part_peak - b_base, UNIT)
        b_total = b_total * b_shrink + b_part_total * b_grow
        b_sum = b_sum * b_shrink[:, None] + b_part_sum * b_grow[:, None]
        b_peak = b_new
        o_part += rows
    b_safe = tl.where(b_total == 0.0, 1.0, b_total)
    b_sum = b_sum / b_safe[:, None]
    if not ZERO_ROWS:
        b_sum = tl.where((b_total == 0.0)[:, None], float("nan"), b_sum)
    tl.store(p_lse + o_row, b_peak * (1.0 / UNIT) + tl.log(b_safe), mask=m_row)
    tl.store(p_out + o_row[:, None] * dv + o_dv[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_tile)


def merge(
    sums: Tensor,
    peak: Tensor,
    total: Tensor,
    out: Tensor,
    lse: Tensor,
    unit: float,
    zero_rows: bool,
    redo: Tensor | None = None,
) -> None:
    """Merge `[parts, ..]` of the three, as `attend` writes them, into `out` `[.., dv]` and `lse` `[..]`."""
    dv = out.shape[-1]
    launch(
        merge_parts_kernel,
        triton.cdiv(lse.numel(), MERGED_ROWS),
        out,
        *(sums, peak, total, redo, out, lse, lse.numel(), sums.shape[0], dv),
        UNIT=unit,
        ZERO_ROWS=zero_rows,
        ROWS=MERGED_ROWS,
        BLOCK_DV=triton.next_power_of_2(max(16, dv)),
    )


@torch.library.custom_op("effopt_triton::decode_attention", mutates_args=(), schema=SCHEMA)
def _decode_attention(*given: Any) -> tuple[Tensor, Tensor]:
    call = checked(*given)
    out, lse = outputs(call)
    divided = parts_of(call) if out.numel() > 0 else 0
    if divided == 1:
        attend(call, out, lse)
    if divided <= 1:
        return out, lse
    sums = out.new_empty((divided, *out.shape), dtype=torch.float32)
    peak, total = (out.new_empty((divided, *lse.shape), dtype=torch.float32) for _ in range(2))
    attend(call, sums, None, peak, total, divided)
    merge(sums, peak, total, out, lse, call.options()["UNIT"], call.zero_masked_rows)
    return out, lse


@_decode_attention.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    return outputs(AttentionCall(*given))


def parts_of(call: AttentionCall) -> int:
    """Parts that the keys of a call are divided into."""
    return parts(call.row_tiles, _keys_seen(call))


def _keys_seen(call: AttentionCall) -> int:
    """Keys that some row of the call sees by its band."""
    _, _, _, t, s = call.sizes
    low, high = call.band
    first, stop = max(0, low), min(s, max(t + high, call.ahead))
    return max(0, stop - first) + max(0, min(call.anchored, first, stop)) if call.hides else s


@by_operands(ops.attention)
def decode_attention(operands: Operands) -> Tensor:
    """`ops.attention` by two kernels, keys divided; arguments as of `flash_attention`."""
    return as_given(_decode_attention(*prepare(operands))[0], operands)


def _divided(operands: Operands) -> int:
    """Parts of a call, at the hints of symbolic sizes."""
    keys = share_of_keys(operands) * hint(operands["key"].shape[-2])
    return parts(row_tiles(operands), math.ceil(keys))


def _programs(operands: Operands) -> float:
    return row_tiles(operands) * _divided(operands)


_walk = attention_cost(_programs, launches=2)


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """That of the walk, and of parts that are written and read again."""
    rows, dv = math.prod(map(hint, result.shape[:-1])), hint(result.shape[-1])
    parted = 2.0 * 4.0 * _divided(operands) * rows * (dv + 2)
    return float(_walk(target, operands, result)) + parted / target.bytes_per_s


DECODE_ATTENTION = Lowering(
    ops.attention, "triton-divided", decode_attention, supports, _cost, differentiable=False
)
