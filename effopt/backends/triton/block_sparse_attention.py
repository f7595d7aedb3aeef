"""Attention over selected blocks of keys: a program walks the list of its block of queries.

A program holds a tile of queries of one head, walks over the blocks of keys that are selected for them, in
tiles, and keeps of each row the greatest score so far, the sum of its weights and the weighted sum of values.
What is not selected is never loaded. A first kernel lists the blocks of each row in ascending order, in one
pass over their bools. So only the last one of a list can have an edge: the queries' own block under
causality, or the ragged last one. The others compare no indices.

Reads query once, and the selected keys and values once for each tile of queries. Accumulates in float32.

Source: Dao et al. 2022, arXiv:2205.14135, section 3.3 and algorithm 5 (block-sparse); Milakov & Gimelshein
2018, arXiv:1805.02867, algorithm 3. Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.backends.triton.attention_refusals import call_refusal, evenly
from effopt.backends.triton.attention_scores import exponential, load_lines, place_of_program, scale_scores
from effopt.backends.triton.attention_tiles import CACHED_BYTES, LOG2_E, PROGRAMS, UNMEASURED, tile_for
from effopt.backends.triton.rows import LAUNCH_S, launch, multiplied_in, refusal
from effopt.graph import ops
from effopt.graph.ops.attention import OPTIONS
from effopt.graph.ops.base import Operands, hint
from effopt.graph.ops.block_sparse_attention import blocks_in, mean_of_values
from effopt.target import Target, reads_shared_memory

LISTED = 1024
"""Bools of a row that a program of the first kernel looks at in a step."""


@triton.jit(do_not_specialize=["rows", "columns"])
def list_blocks_kernel(
    p_blocks, p_index, p_count, blocks_strides, heads, rows, columns, CAUSAL: tl.constexpr, STEP: tl.constexpr
):
    """Selected columns of one row in ascending order, and how many; what is behind them is not written."""
    i_block, i_line = tl.program_id(0) % rows, (tl.program_id(0) // rows).to(tl.int64)
    p_blocks += (i_line // heads) * blocks_strides[0] + (i_line % heads) * blocks_strides[1]
    p_blocks += i_block.to(tl.int64) * blocks_strides[2]
    p_index += (i_line * rows + i_block) * columns
    stop = tl.minimum(columns, i_block + 1) if CAUSAL else columns
    count = 0
    for first in tl.range(0, stop, STEP):
        o_column = first + tl.arange(0, STEP)
        p_column = p_blocks + o_column.to(tl.int64) * blocks_strides[3]
        b_open = (tl.load(p_column, mask=o_column < stop, other=0) != 0).to(tl.int32)
        tl.store(p_index + count + tl.cumsum(b_open, axis=0) - 1, o_column, mask=b_open != 0)
        count += tl.sum(b_open, axis=0)
    tl.store(p_count + i_line * rows + i_block, count)


@triton.jit(do_not_specialize=["t", "s", "rows", "columns", "span"])
def block_sparse_attention_kernel(
    p_query, p_key, p_value, p_mask, p_index, p_count, p_out, p_seen,
    query_strides, key_strides, value_strides, mask_stride, heads, group, t, s, rows, columns, span,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, CAUSAL: tl.constexpr,
    ZERO_ROWS: tl.constexpr, HEAD: tl.constexpr, VALUE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS queries of one head over the blocks of keys selected for the block that holds it."""
    PARTS: tl.constexpr = BLOCK // ROWS
    STEPS: tl.constexpr = BLOCK // KEYS
    tiles = rows * PARTS
    i_tile, _part, i_line = place_of_program(tiles, 1, span)
    i_tile, i_line = tiles - 1 - i_tile, i_line.to(tl.int64)
    i_b, i_head = i_line // heads, i_line % heads
    o_t = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_t < t
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_row = p_query + i_b * query_strides[0] + i_head * query_strides[1] + o_t.to(tl.int64) * query_strides[2]
    b_query = load_lines(p_row, o_d, m_row, query_strides[3], HEAD, False).to(DOT)
    p_key += i_b * key_strides[0] + (i_head // group) * key_strides[1]
    p_value += i_b * value_strides[0] + (i_head // group) * value_strides[1]
    if p_mask is not None:
        p_mask += i_b * mask_stride
    i_row = i_line * rows + i_tile // PARTS
    count = tl.load(p_count + i_row)
    p_index += i_row * columns

    b_peak = tl.full([ROWS], float("-inf"), tl.float32)
    b_total = tl.zeros([ROWS], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    o_key = tl.arange(0, KEYS).to(tl.int64)
    for EDGE in tl.static_range(2):
        first = tl.maximum(count - 1, 0) * STEPS if EDGE else 0
        stop = count * STEPS if EDGE else tl.maximum(count - 1, 0) * STEPS
        for i in tl.range(first, stop):
            i_s = tl.load(p_index + i // STEPS) * BLOCK + (i % STEPS) * KEYS
            o_s = i_s + tl.arange(0, KEYS)
            m_s = o_s < s
            p_line = (p_key + i_s.to(tl.int64) * key_strides[2]) + o_key * key_strides[2]
            b_key = load_lines(p_line, o_d, m_s, key_strides[3], HEAD, EDGE == 0).to(DOT)
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
            b_score, _ = scale_scores(b_score, SCALE, SOFTCAP, UNIT)
            if p_mask is not None:
                b_mask = tl.load(p_mask + o_s, mask=m_s, other=0)
                b_score = tl.where((b_mask != 0)[None, :], b_score, float("-inf"))
            if EDGE:
                b_score = tl.where(m_s[None, :], b_score, float("-inf"))
                if CAUSAL:
                    b_score = tl.where(o_s[None, :] <= o_t[:, None], b_score, float("-inf"))
            b_new = tl.maximum(b_peak, tl.max(b_score, axis=1))
            # Finite, so that a row without a key so far gets weights of 0 and not exp(-inf + inf).
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_weight = exponential(b_score - b_base[:, None], UNIT)
            b_shrink = exponential(b_peak - b_base, UNIT)
            b_total = b_total * b_shrink + tl.sum(b_weight, axis=1)
            p_line = (p_value + i_s.to(tl.int64) * value_strides[2]) + o_key * value_strides[2]
            b_value = load_lines(p_line, o_dv, m_s, value_strides[3], VALUE_HEAD, EDGE == 0).to(DOT)
            b_sum = tl.dot(b_weight.to(DOT), b_value, b_sum * b_shrink[:, None], input_precision="ieee")
            b_peak = b_new

    o_line = i_line * t + o_t
    tl.store(p_seen + o_line, (b_peak != float("-inf")).to(tl.int8), mask=m_row)
    b_sum = b_sum / tl.where(b_total == 0.0, 1.0, b_total)[:, None]
    if not ZERO_ROWS:
        b_sum = tl.where((b_total == 0.0)[:, None], float("nan"), b_sum)
    m_out = m_row[:, None] & (o_dv < VALUE_HEAD)[None, :]
    tl.store(
        p_out + o_line[:, None] * VALUE_HEAD + o_dv[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_out
    )


def listed(blocks: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Selected columns of each row in ascending order, the rest unwritten; and how many: int32."""
    b, h, rows, columns = blocks.shape
    index = torch.empty((b, h, rows, columns), dtype=torch.int32, device=blocks.device)
    count = torch.empty((b, h, rows), dtype=torch.int32, device=blocks.device)
    step = max(16, min(LISTED, triton.next_power_of_2(columns)))
    launch(
        list_blocks_kernel,
        b * h * rows,
        blocks,
        *(blocks.view(torch.uint8), index, count, blocks.stride(), h, rows, columns),
        CAUSAL=is_causal,
        STEP=step,
    )
    return index, count


def options(query: Tensor, value: Tensor, block: int, scale: float, softcap: float) -> dict[str, Any]:
    """Constants that the kernel is compiled for."""
    d, dv = query.shape[-1], value.shape[-1]
    tile = tile_for(block, max(d, dv), query.dtype, False, reads_shared_memory(query.device))
    return {
        "SCALE": scale if softcap else scale * LOG2_E,
        "SOFTCAP": abs(softcap),
        "UNIT": LOG2_E,
        "HEAD": d,
        "VALUE_HEAD": dv,
        "BLOCK_D": triton.next_power_of_2(max(16, d)),
        "BLOCK_DV": triton.next_power_of_2(max(16, dv)),
        "BLOCK": block,
        "ROWS": min(block, tile.rows),
        "KEYS": min(block, tile.keys),
        "DOT": multiplied_in(query),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@torch.library.custom_op(
    "effopt_triton::block_sparse_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor blocks, int block, float scale, bool is_causal,"
    " float softcap, Tensor? key_mask, bool zero_masked_rows) -> (Tensor, Tensor)",
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block: int,
    scale: float,
    is_causal: bool,
    softcap: float,
    key_mask: Tensor | None,
    zero_masked_rows: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and which rows see a key; the others hold 0, or NaN without `zero_masked_rows`."""
    query, key, value = map(evenly, (query, key, value))
    b, h, t, _ = query.shape
    s = key.shape[2]
    rows, columns = blocks_in(t, block), blocks_in(s, block)
    out = query.new_empty((b, h, t, value.shape[-1]))
    seen = query.new_empty((b, h, t), dtype=torch.int8)
    made = options(query, value, block, scale, softcap)
    mask = None if key_mask is None else key_mask.expand(b, s).contiguous().view(torch.uint8)
    order, counts = listed(blocks.expand(b, h, rows, columns), is_causal)
    launch(
        block_sparse_attention_kernel,
        b * h * rows * (block // made["ROWS"]),
        out,
        *(query, key, value, mask, order, counts, out, seen),
        *(x.stride() for x in (query, key, value)),
        *(s, h, h // key.shape[1], t, s, rows, columns, _heads_in_turn(key, value, b * h, is_causal)),
        CAUSAL=is_causal,
        ZERO_ROWS=zero_masked_rows,
        **made,
    )
    return out, seen


def _heads_in_turn(key: Tensor, value: Tensor, lines: int, is_causal: bool) -> int:
    """Heads whose tiles take turns: as `AttentionCall.lines_in_turn`, for later rows have more to select."""
    read_bytes = key.shape[2] * (key.shape[3] + value.shape[3]) * key.element_size()
    return max(1, min(lines, CACHED_BYTES // max(1, read_bytes))) if is_causal else 1


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=torch.int8)


def _call_refusal(operands: Operands) -> str | None:
    block = operands["block"]
    if block < 16 or block & (block - 1):
        return f"blocks of {block} tokens, and the kernel wants 16, 32, 64, .."
    dense = dict.fromkeys(OPTIONS) | {"dropout_p": 0.0}
    return call_refusal({**dense, **{name: operands[name] for name in ("query", "key", "value")}})


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    *,
    block: int,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    key_mask: Tensor | None = None,
    masked_rows: str = "nan",
    density: float = 1.0,
) -> Tensor:
    """`ops.block_sparse_attention` by one kernel; arguments as there, of any strides, up to float32.

    Raises:
        ValueError: the operands do not fit together, or the kernel does not take such a call.
    """
    reason = _call_refusal({"query": query, "key": key, "value": value, "block": block})
    if reason is not None:
        raise ValueError(reason)
    zeros = masked_rows != "nan"
    out, seen = _forward(query, key, value, blocks, block, scale, is_causal, softcap, key_mask, zeros)
    if masked_rows != "mean":
        return out
    return torch.where(seen.bool().unsqueeze(-1), out, mean_of_values(value, query.shape[1]))


def _supports(target: Target, operands: Operands) -> str | None:
    floating = {name: operands[name] for name in ("query", "key", "value")}
    return refusal(target, floating) or _call_refusal(operands)


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline of what is selected, at the rate that attention kernels are taken to run."""
    op, query = ops.block_sparse_attention, operands["query"]
    moved = op.bytes_moved(operands, result) / target.bytes_per_s
    work = op.flops(operands, result) / target.flops_per_s
    programs = math.prod(map(hint, query.shape[:2])) * blocks_in(hint(query.shape[-2]), operands["block"])
    return UNMEASURED * max(moved, work) / min(1.0, max(1, programs) / PROGRAMS) + 3 * LAUNCH_S


BLOCK_SPARSE_ATTENTION = Lowering(
    ops.block_sparse_attention, "triton", block_sparse_attention, _supports, _cost, differentiable=False
)
