"""Attention of few rows over keys in pages: a program looks its keys up in the table, and gathers none.

As in `decode_attention.py` the keys of a row tile are divided among programs, each of which writes the
weighted sum of values, the greatest score and the sum of weights of its part, and the same second kernel
merges them in order. Lengths are read on the device: how many parts there are follows from what a table has
room for, how long they are from what a request holds. Where a page holds whole tiles its number is looked up
once a tile, else once a key.

A page outside of the pool, in the part of a table that is read, is never loaded and makes its rows NaN.

Source: Kwon et al. 2023, arXiv:2309.06180, section 5.1; parts and their merge as in `decode_attention.py`.
Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering, by_operands
from effopt.backends.triton.attention_refusals import MAX_HEAD_SIZE
from effopt.backends.triton.attention_scores import exponential, load_lines, scale_scores
from effopt.backends.triton.attention_tiles import (
    LOG2_E,
    PROGRAMS,
    UNMEASURED,
    AttentionTile,
    tile_for,
)
from effopt.backends.triton.decode_attention import merge, parts
from effopt.backends.triton.rows import LAUNCH_S, check_floating, launch, multiplied_in, refusal
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint
from effopt.graph.ops.paged_attention import call_problem, held_share
from effopt.target import Target, reads_shared_memory

LOOKED_UP_STAGES = 5
"""Of few rows, where shared memory has room. Keys are loaded after the number of their page, and Triton 3.9
loads those of the next step ahead from five stages on; with fewer only the number is."""
_FLOATING, _INTEGERS = ("query", "key_pages", "value_pages"), ("page_table", "lengths")


# What changes from step to step of a decode compiles nothing anew.
@triton.jit(do_not_specialize=["t", "room", "pages", "parts"])
def paged_attention_kernel(
    p_query, p_key, p_value, p_table, p_lengths, p_out, p_peak, p_total,
    query_strides, key_strides, value_strides, table_stride, hkv, group, t, room, pages, parts,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one part of its keys.

    With p_peak and p_total it writes, in float32, the sum of values, the greatest score, in units of UNIT,
    and the sum of weights; without, where there is one part, the result.
    """
    tiles = tl.cdiv(t * group, ROWS)
    i_tile = tiles - 1 - tl.program_id(0) % tiles
    i_split = (tl.program_id(0) // tiles) % parts
    i_line = tl.program_id(0) // (tiles * parts)
    i_b, i_hkv = (i_line // hkv).to(tl.int64), (i_line % hkv).to(tl.int64)
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < t * group
    o_t, o_head = o_row // group, i_hkv * group + o_row % group
    o_d, o_dv, o_key = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, KEYS)
    p_row = p_query + i_b * query_strides[0] + o_head * query_strides[1] + o_t.to(tl.int64) * query_strides[2]
    b_query = load_lines(p_row, o_d, m_row, query_strides[3], HEAD, False).to(DOT)
    p_key += i_hkv * key_strides[1]
    p_value += i_hkv * value_strides[1]
    p_table += i_b * table_stride

    # Beyond room + t nothing changes any more, and int32 holds it.
    length = tl.minimum(tl.load(p_lengths + i_b), room + t).to(tl.int32)
    o_last = length - t + o_t
    t_last = tl.minimum((i_tile * ROWS + ROWS - 1) // group, t - 1)
    stop = tl.maximum(tl.minimum(length - t + t_last + 1, room), 0)
    count = tl.cdiv(stop, KEYS)
    part = tl.cdiv(count, parts)
    first = tl.minimum(i_split * part, count)
    b_peak = tl.full([ROWS], float("-inf"), tl.float32)
    b_total = tl.zeros([ROWS], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for i_s in tl.range(first, tl.minimum(first + part, count)):
        o_s = i_s * KEYS + o_key
        m_s = o_s < stop
        if PAGE % KEYS == 0:
            # One page for all keys of the tile, the first of which is there.
            b_page = tl.load(p_table + (i_s * KEYS) // PAGE).to(tl.int64) + tl.zeros([KEYS], tl.int64)
            o_place = ((i_s * KEYS) % PAGE + o_key).to(tl.int64)
        else:
            b_page = tl.load(p_table + o_s // PAGE, mask=m_s, other=0).to(tl.int64)
            o_place = (o_s % PAGE).to(tl.int64)
        m_page = (b_page >= 0) & (b_page < pages)
        m_line = m_s & m_page
        p_line = p_key + b_page * key_strides[0] + o_place * key_strides[2]
        b_key = load_lines(p_line, o_d, m_line, key_strides[3], HEAD, False).to(DOT)
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        b_score, _ = scale_scores(b_score, SCALE, SOFTCAP, UNIT)
        b_seen = (o_s[None, :] <= o_last[:, None]) & m_s[None, :]
        b_score = tl.where(b_seen, b_score, float("-inf"))
        b_new = tl.maximum(b_peak, tl.max(b_score, axis=1))
        # Finite, so that a row without a key so far gets weights of 0 and not exp(-inf + inf).
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = exponential(b_score - b_base[:, None], UNIT)
        b_shrink = exponential(b_peak - b_base, UNIT)
        b_total = b_total * b_shrink + tl.sum(b_weight, axis=1)
        p_line = p_value + b_page * value_strides[0] + o_place * value_strides[2]
        b_value = load_lines(p_line, o_dv, m_line, value_strides[3], VALUE_HEAD, False).to(DOT)
        # After the cast: the interpreter of Triton 3.6 has no bfloat16 constant, and DOT is float32 there.
        b_value = tl.where((m_s & ~m_page)[:, None], float("nan"), b_value)
        b_sum = tl.dot(b_weight.to(DOT), b_value, b_sum * b_shrink[:, None], input_precision="ieee")
        b_peak = b_new

    o_line = (i_b * hkv * group + o_head) * t + o_t
    if p_peak is not None:
        o_line += i_split * (tl.num_programs(0) // (tiles * parts)).to(tl.int64) * group * t
        tl.store(p_peak + o_line, b_peak, mask=m_row)
        tl.store(p_total + o_line, b_total, mask=m_row)
    else:
        b_sum = b_sum / tl.where(b_total == 0.0, 1.0, b_total)[:, None]
    m_out = m_row[:, None] & (o_dv < VALUE_HEAD)[None, :]
    tl.store(
        p_out + o_line[:, None] * VALUE_HEAD + o_dv[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_out
    )


def tile_of(query: Tensor, key_pages: Tensor, value_pages: Tensor, shared: bool = False) -> AttentionTile:
    """The tile of a call, at the hints of symbolic sizes; `shared` as of `tile_for`."""
    group = hint(query.shape[1]) // max(1, hint(key_pages.shape[1]))
    head = max(hint(query.shape[-1]), hint(value_pages.shape[-1]))
    tile = tile_for(hint(query.shape[2]) * group, head, query.dtype, dense=False, shared=shared)
    return replace(tile, stages=LOOKED_UP_STAGES) if shared and tile.rows == 16 and tile.stages > 1 else tile


def options(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, scale: float, softcap: float
) -> dict[str, Any]:
    """Constants that the kernel is compiled for."""
    d, dv = query.shape[-1], value_pages.shape[-1]
    return {
        "SCALE": scale if softcap else scale * LOG2_E,
        "SOFTCAP": abs(softcap),
        "UNIT": LOG2_E,
        "PAGE": key_pages.shape[2],
        "HEAD": d,
        "VALUE_HEAD": dv,
        "BLOCK_D": triton.next_power_of_2(max(16, d)),
        "BLOCK_DV": triton.next_power_of_2(max(16, dv)),
        "DOT": multiplied_in(query),
        **tile_of(query, key_pages, value_pages, reads_shared_memory(query.device)).options(),
    }


@torch.library.custom_op("effopt_triton::paged_attention", mutates_args=(), schema=ops.paged_attention.schema)
def _forward(*pools: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    query, key_pages, value_pages, page_table, lengths = pools
    reason = _call_refusal(*pools)
    if reason is not None:
        raise ValueError(reason)
    (b, h, t, _), (pages, hkv, page, _) = query.shape, key_pages.shape
    out = query.new_empty((b, h, t, value_pages.shape[-1]))
    if not out.numel():
        return out
    made = options(query, key_pages, value_pages, scale, softcap)
    row_tiles = b * hkv * triton.cdiv(t * (h // hkv), made["ROWS"])
    room = page_table.shape[1] * page
    divided = parts(row_tiles, room)
    sums, peak, total = out, None, None
    if divided > 1:
        sums = out.new_empty((divided, *out.shape), dtype=torch.float32)
        peak, total = (out.new_empty((divided, b, h, t), dtype=torch.float32) for _ in range(2))
    table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    launch(
        paged_attention_kernel,
        row_tiles * divided,
        out,
        *(query, key_pages, value_pages, table, lengths.contiguous(), sums, peak, total),
        *(x.stride() for x in (query, key_pages, value_pages)),
        *(table.stride(0), hkv, h // hkv, t, room, pages, divided),
        **made,
    )
    if peak is not None and total is not None:
        merge(sums, peak, total, out, torch.empty_like(total[0]), LOG2_E, zero_rows=True)
    return out


@_forward.register_fake
def _(query: Tensor, key_pages: Tensor, value_pages: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value_pages.shape[-1]))


def _call_refusal(*pools: Tensor) -> str | None:
    """Why the kernel does not take such a call on any target, or None. Adds no guard on symbols."""
    query, key_pages, value_pages, _, _ = pools
    problem = call_problem(*pools)
    if problem is not None:
        return problem
    if query.dtype == torch.float64:
        return "query and pages are torch.float64, and the kernel wants float32 or narrower"
    numbers = (query.shape[-1], value_pages.shape[-1], key_pages.shape[2])
    if not all(isinstance(n, int) for n in numbers):
        return f"head sizes and page size, {numbers}, are symbolic, and the kernel wants numbers"
    if not 1 <= min(numbers) <= max(numbers[:2]) <= MAX_HEAD_SIZE:
        return f"head sizes are {numbers[0]} and {numbers[1]}, and the kernel wants 1 to {MAX_HEAD_SIZE}"
    return None


@by_operands(ops.paged_attention)
def paged_attention(operands: Operands) -> Tensor:
    """`ops.paged_attention` by two kernels; arguments as there, of any strides, up to float32.

    Raises:
        TypeError: query or pages have a dtype that no kernel reads.
        ValueError: the operands do not fit together, or the kernel does not take such a call.
    """
    check_floating(**{name: operands[name] for name in _FLOATING})
    out: Tensor = _forward(**operands)
    return out


def _supports(target: Target, operands: Operands) -> str | None:
    floating = {name: operands[name] for name in _FLOATING}
    return refusal(target, floating) or _call_refusal(*(operands[name] for name in (*_FLOATING, *_INTEGERS)))


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline of what requests hold by guess, and of parts that are written and read again."""
    query, pages, value_pages = (operands[name] for name in ("query", "key_pages", "value_pages"))
    op, tile = ops.paged_attention, tile_of(query, pages, value_pages)
    b, h, t, _ = map(hint, query.shape)
    hkv = hint(pages.shape[1])
    row_tiles = b * hkv * triton.cdiv(t * (h // max(1, hkv)), tile.rows)
    room = hint(operands["page_table"].shape[1]) * hint(pages.shape[2])
    divided = parts(row_tiles, math.ceil(held_share(b) * room))
    parted = 2.0 * 4.0 * divided * b * h * t * (hint(value_pages.shape[-1]) + 2)
    moved = op.bytes_moved(operands, result) / target.bytes_per_s
    work = op.flops(operands, result) / target.flops_per_s
    busy = min(1.0, max(1, row_tiles * divided) / PROGRAMS)
    return UNMEASURED * max(moved, work) / busy + 2 * LAUNCH_S + parted / target.bytes_per_s


PAGED_ATTENTION = Lowering(
    ops.paged_attention, "triton", paged_attention, _supports, _cost, differentiable=False
)
