"""Attention of few rows over keys of many lengths: every program takes equally many tiles of keys.

`decode_attention.py` divides the keys of each row tile into the same number of parts. Where requests have
different lengths, its longest parts are what is waited for; where row tiles are not a divisor of what a
GPU holds, its last wave is ragged. Here all tiles of keys of all requests and heads stand in one row
(`stream_k_schedule.py`) that is cut into equal shares. A program walks over its share; whenever a line
ends it writes (o, m, l) of what it saw of it, in float32. A second kernel (`stream_k_merge.py`) merges the
parts of each line: no atomics, and the bits repeat for equal lengths.

Where a mask over keys, such as that of padding, or ids leave a request part of the keys, a small kernel finds
its first and last tile before; nothing is read on the host.

Source: Sanovar et al. 2024, Lean Attention, arXiv:2405.10480. Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.base import Lowering, by_operands
from effopt.backends.triton.attention_refusals import as_given, checked, prepare
from effopt.backends.triton.attention_refusals import supports as fits_kernels
from effopt.backends.triton.attention_scores import exponential, load_lines, score_block
from effopt.backends.triton.attention_tiles import (
    PROGRAMS,
    AttentionCall,
    attention_cost,
    row_tiles,
    share_of_keys,
)
from effopt.backends.triton.decode_attention import LEAST_KEYS
from effopt.backends.triton.flash_attention import SCHEMA, outputs
from effopt.backends.triton.rows import LAUNCH_S, launch
from effopt.backends.triton.stream_k_merge import MERGED_ROWS, merge_lines_kernel
from effopt.backends.triton.stream_k_schedule import (
    extents_kernel,
    place_of_tile,
    share_of_tiles,
    tiles_of_requests,
)
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint
from effopt.target import Target

MOST_ROWS, MOST_REQUESTS = 128, 1024
"""Rows of a KV head, and requests. With more rows programs are many enough; every program adds up the
lengths of all requests."""


@triton.jit(do_not_specialize=["t", "s", "low", "high", "prefix", "batch", "first", "count"])
def stream_k_kernel(
    p_query, p_key, p_value, p_bias, p_mask, p_query_ids, p_key_ids, p_extents,
    p_sum, p_peak, p_total, query_strides, key_strides, value_strides, bias_strides, mask_strides,
    query_ids_stride, key_ids_stride, hkv, group, t, s, low, high, prefix, batch, first, count,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, FILL: tl.constexpr,
    CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, PREFIX: tl.constexpr, HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, REQUESTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One share of all tiles of keys."""
    o_b = tl.arange(0, REQUESTS)
    b_first, b_count = tiles_of_requests(p_extents, o_b, batch, first, count)
    row_tiles = tl.cdiv(t * group, ROWS)
    lines = hkv * row_tiles
    share, total = share_of_tiles(b_count, lines, tl.num_programs(0))
    tile = tl.program_id(0) * share
    stop = tl.minimum(tile + share, total)
    o_d, o_dv, o_key = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, KEYS)
    while tile < stop:
        i_b, i_line, i_tile = place_of_tile(tile, o_b, b_count, lines)
        at = tl.sum(tl.where(o_b == i_b, b_first, 0), axis=0) + i_tile
        left = tl.sum(tl.where(o_b == i_b, b_count, 0), axis=0) - i_tile
        taken = tl.minimum(stop - tile, left)
        i_request, i_hkv = i_b.to(tl.int64), (i_line // row_tiles).to(tl.int64)
        o_row = (i_line % row_tiles) * ROWS + tl.arange(0, ROWS)
        m_row = o_row < t * group
        o_t, o_head = o_row // group, i_hkv * group + o_row % group
        o_far = o_t.to(tl.int64)
        p_row = p_query + i_request * query_strides[0] + o_head * query_strides[1] + o_far * query_strides[2]
        b_query = load_lines(p_row, o_d, m_row, query_strides[3], HEAD, False).to(DOT)
        p_bias_row, p_mask_row, p_ids_row = p_bias, p_mask, p_key_ids
        if p_bias is not None:
            p_bias_row += (
                i_request * bias_strides[0] + (o_head * bias_strides[1] + o_far * bias_strides[2])[:, None]
            )
        if p_mask is not None:
            p_mask_row += i_request * mask_strides[0]
            if not MASK_OVER_KEYS:
                p_mask_row += (o_head * mask_strides[1] + o_far * mask_strides[2])[:, None]
        b_query_ids = o_t
        if p_key_ids is not None:
            p_ids_row += i_request * key_ids_stride
            p_ids = p_query_ids + i_request * query_ids_stride + o_t
            b_query_ids = tl.load(p_ids, mask=m_row, other=0).to(tl.int64)
        b_peak = tl.full([ROWS], float("-inf"), tl.float32)
        b_total = tl.zeros([ROWS], tl.float32)
        b_sum = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        for i_s in tl.range(at, at + taken):
            o_s = i_s * KEYS + o_key
            m_s = o_s < s
            o_place = o_s.to(tl.int64)
            p_line = p_key + i_request * key_strides[0] + i_hkv * key_strides[1]
            p_line = p_line + o_place * key_strides[2]
            p_value_line = p_value + i_request * value_strides[0] + i_hkv * value_strides[1]
            p_value_line = p_value_line + o_place * value_strides[2]
            b_key = load_lines(p_line, o_d, m_s, key_strides[3], HEAD, False).to(DOT)
            b_score, _, _ = score_block(
                b_query, b_key, p_bias_row, p_mask_row, b_query_ids, p_ids_row, o_t, o_s, m_row, m_s, low,
                high, 0, prefix, bias_strides[3], mask_strides[3], SCALE, SOFTCAP, UNIT, FILL, CAUSAL,
                MASK_OVER_KEYS, False, PREFIX, True,
            )  # fmt: skip
            b_new = tl.maximum(b_peak, tl.max(b_score, axis=1))
            # Finite, so that a row without a key so far gets weights of 0 and not exp(-inf + inf).
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_weight = exponential(b_score - b_base[:, None], UNIT)
            b_shrink = exponential(b_peak - b_base, UNIT)
            b_total = b_total * b_shrink + tl.sum(b_weight, axis=1)
            b_value = load_lines(p_value_line, o_dv, m_s, value_strides[3], VALUE_HEAD, False).to(DOT)
            b_sum = b_sum * b_shrink[:, None]
            b_sum = tl.dot(b_weight.to(DOT), b_value, b_sum, input_precision="ieee")
            b_peak = b_new
        slot = tl.program_id(0).to(tl.int64) + i_request * lines + i_line
        o_part = slot * ROWS + tl.arange(0, ROWS)
        tl.store(p_total + o_part, b_total)
        tl.store(p_peak + o_part, b_peak)
        m_sum = (o_dv < VALUE_HEAD)[None, :] & m_row[:, None]
        tl.store(p_sum + o_part[:, None] * VALUE_HEAD + o_dv[None, :], b_sum, mask=m_sum)
        tile += taken


@dataclass(frozen=True)
class Stream:
    """One call with rows, as the two kernels take it."""

    tensors: tuple[Any, ...]
    """Operands of the walk, from query to extents."""
    strides: tuple[Any, ...]
    sinks: Tensor | None
    sizes: tuple[int, int, int, int]
    """b, hkv, heads of a group, t."""
    keys: tuple[int, int, int, int]
    """s, low, high, and the first keys that `high` does not mask."""
    tiles: tuple[int, int]
    """First tile of keys and number of tiles of all requests, where nothing tells them apart."""
    zero_masked_rows: bool
    options: Mapping[str, Any]
    """Constants of the walk."""

    def run(self, out: Tensor, lse: Tensor) -> None:
        """Walk, then merge into `out` and `lse`."""
        (b, hkv, group, t), rows = self.sizes, self.options["ROWS"]
        lines = b * hkv * triton.cdiv(t * group, rows)
        sums = out.new_empty((PROGRAMS + lines, rows, out.shape[-1]), dtype=torch.float32)
        peak, total = (lse.new_empty((PROGRAMS + lines, rows)) for _ in range(2))
        parts, requests = (sums, peak, total), triton.next_power_of_2(b)
        numbers = (hkv, group, t, *self.keys, b, *self.tiles)
        walk = (*self.tensors, *parts, *self.strides, *numbers)
        launch(stream_k_kernel, PROGRAMS, out, *walk, **self.options, REQUESTS=requests)
        sink_stride = 0 if self.sinks is None else self.sinks.stride(0)
        names = ("UNIT", "VALUE_HEAD", "BLOCK_DV", "ROWS")
        launch(
            merge_lines_kernel,
            lines * (rows // MERGED_ROWS),
            out,
            *(*parts, self.sinks, self.tensors[-1], out, lse, sink_stride),
            *(hkv, group, t, b, *self.tiles, PROGRAMS),
            **{name: self.options[name] for name in names},
            ZERO_ROWS=self.zero_masked_rows,
            REQUESTS=requests,
            MERGED=MERGED_ROWS,
        )


def _stream_of(call: AttentionCall) -> Stream:
    """The call, after its extents were found on the device if a mask over keys or ids tell requests apart."""
    b, hkv, group, t, s = call.sizes
    (low, high), options = call.band, call.options()
    hides, _ = options.pop("HIDES"), options.pop("ANCHORS")
    first, stop = (max(0, low), max(0, min(s, max(t + high, call.ahead)))) if hides else (0, s)
    stop = min(stop, t) if call.is_causal else stop
    keys = options["KEYS"]
    strides = call.strides()
    query, key, value, bias, mask, sinks, query_ids, key_ids = call.tensors()
    extents = None
    if hides and (key_ids is not None or options["MASK_OVER_KEYS"]):
        extents = torch.empty((2, b), dtype=torch.int32, device=query.device)
        launch(
            extents_kernel,
            b,
            query,
            *(mask if options["MASK_OVER_KEYS"] else None, query_ids, key_ids, extents),
            *(*strides[4:], t, first, stop),
            MASK_OVER_KEYS=options["MASK_OVER_KEYS"],
            KEYS=keys,
            QUERIES=triton.next_power_of_2(t),
        )
    tensors = (query, key, value, bias, mask, query_ids, key_ids, extents)
    tiles = (first // keys, triton.cdiv(stop, keys) - first // keys if stop > first else 0)
    sizes, band = (b, hkv, group, t), (s, low, high, call.ahead)
    return Stream(tensors, strides, sinks, sizes, band, tiles, call.zero_masked_rows, options)


@torch.library.custom_op("effopt_triton::stream_k_attention", mutates_args=(), schema=SCHEMA)
def _stream_k_attention(*given: Any) -> tuple[Tensor, Tensor]:
    call = checked(*given)
    out, lse = outputs(call)
    if out.numel() > 0:
        _stream_of(call).run(out, lse)
    return out, lse


@_stream_k_attention.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    return outputs(AttentionCall(*given))


@by_operands(ops.attention)
def stream_k_attention(operands: Operands) -> Tensor:
    """`ops.attention` of few rows by shares of tiles; arguments as of `flash_attention`."""
    reason = _apart(operands)
    if reason is not None:
        raise ValueError(reason)
    return as_given(_stream_k_attention(*prepare(operands))[0], operands)


def _apart(operands: Operands) -> str | None:
    """Why the keys of a request are not next to each other, or None."""
    if operands["anchors"] is None:
        return None
    return "first keys that the lower bound or ids do not mask, and the kernel takes keys next to each other"


def _too_many(query: Any, key: Any) -> str | None:
    """Why there are too many rows or requests for shares of tiles to pay, at hints of symbols, or None."""
    group = hint(query.shape[1]) // max(1, hint(key.shape[1])) if query.dim() == 4 else 1
    rows = hint(query.shape[-2]) * group
    if rows > MOST_ROWS:
        return (
            f"{rows} rows (queries, and heads of a group) share a KV head, and the kernel is for {MOST_ROWS}"
        )
    requests = hint(query.shape[0]) if query.dim() == 4 else 1
    if requests > MOST_REQUESTS:
        return f"{requests} requests, and each program adds up the lengths of at most {MOST_REQUESTS}"
    return None


def _supports(target: Target, operands: Operands) -> str | None:
    refused = fits_kernels(target, operands) or _apart(operands)
    return refused or _too_many(operands["query"], operands["key"])


def _programs(operands: Operands) -> float:
    """Programs with a share worth its merging."""
    keys = share_of_keys(operands) * hint(operands["key"].shape[-2])
    return row_tiles(operands) * max(1, keys // LEAST_KEYS)


_walk = attention_cost(_programs, launches=3)


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """That of the walk, and of parts that are written and read again.

    Lengths of requests are known at run time only. They are guessed to be spread evenly up to the longest, of
    which a program here waits for the mean, and one with a part of its own request for the longest.
    """
    rows, dv = math.prod(map(hint, result.shape[:-1])), hint(result.shape[-1])
    parted = 2.0 * 4.0 * (PROGRAMS * 16 + rows) * (dv + 2) / target.bytes_per_s
    mask, b = operands["mask"], hint(operands["query"].shape[0]) if operands["query"].dim() == 4 else 1
    ragged = (
        mask is not None and mask.dim() == 4 and hint(mask.shape[0]) == b > 1 and hint(mask.shape[2]) == 1
    )
    mean = (b + 1) / (2 * b) if ragged else 1.0
    launches = 3 * LAUNCH_S
    return mean * (float(_walk(target, operands, result)) - launches) + launches + parted


STREAM_K_ATTENTION = Lowering(
    ops.attention, "triton-stream-k", stream_k_attention, _supports, _cost, differentiable=False
)
