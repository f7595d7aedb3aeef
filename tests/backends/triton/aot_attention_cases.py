"""Attention kernels to compile ahead of time: what each is compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from effopt.backends.triton import (
    attention_gradients,
    attention_tiles,
    block_sparse_attention,
    decode_attention,
    flash_attention,
    flash_attention_backward,
    flash_attention_bias_gradient,
    flash_attention_key_gradient,
    paged_attention,
    stream_k_attention,
    stream_k_merge,
    stream_k_schedule,
    unified_max_attention,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
Case = tuple[str, Any, str, dict[str, Any]]
"""Name, kernel, dtype of what pointers point to, launch options: constexprs, num_warps, more `types`, and
`shared`: those that differ where matrix units read shared memory."""


ATTENTION = {
    "window": {"HIDES": True},
    "soft-cap, sinks": {"HIDES": True, "SOFTCAP": 30.0, "sinks": True, "UNIT": 1.0},
    "padded, packed": {"HIDES": True, "MASK_OVER_KEYS": True, "mask": True, "ids": True},
    "bias, filled": {"FILL": -1e4, "CAUSAL": True, "mask": True, "bias": True, "UNIT": 1.0},
    "anchors, prefix": {"HIDES": True, "ANCHORS": True, "PREFIX": True, "ids": True},
    "dropout": {"HIDES": True, "DROPOUT": 0.1, "seed": True},
    "redone": {"HIDES": True, "redo": True},
}
"""Features of a call: options of the kernel, and which operands it has."""


def attention_case(
    dtype: str, queries: int, head: int, feature: str, splits: int = 1, value_head: int = 0, of: str = ""
) -> Case:
    """The forward kernel, or that of the gradient `of` something."""
    value_head = value_head or head
    options = {"SCALE": 0.125, "SOFTCAP": 0.0, "UNIT": attention_tiles.LOG2_E, "FILL": float("-inf")}
    options |= {"HIDES": False, "CAUSAL": False, "MASK_OVER_KEYS": False, "ZERO_ROWS": False}
    options |= {"ANCHORS": False, "PREFIX": False, "DROPOUT": 0.0, "ONE_ROW": False, "ONE_KEY": False}
    options |= {"HEAD": head, "VALUE_HEAD": value_head}
    blocks = [triton.next_power_of_2(max(16, n)) for n in (head, value_head)]
    given = dict(ATTENTION[feature])
    dense, longer = "bias" in given or ("ANCHORS" in given and not of), max(head, value_head)
    if of:
        tile_for, what = attention_gradients.backward_tile_for, of
    else:
        tile_for, what = attention_tiles.tile_for, queries
    tile, shared = (tile_for(what, longer, DTYPES[dtype], dense, on) for on in (False, True))
    options |= {"BLOCK_D": blocks[0], "BLOCK_DV": blocks[1], **tile.options(), "shared": shared.options()}
    options |= {"DOT": tl.bfloat16 if dtype == "bf16" else tl.float32}
    operands = {
        "bias": ["p_bias"],
        "mask": ["p_mask"],
        "sinks": ["p_sinks"],
        "ids": ["p_query_ids", "p_key_ids"],
        "seed": ["p_seed"],
        "redo": ["p_redo"],
    }
    for operand, names in operands.items():
        options |= {} if given.pop(operand, False) else dict.fromkeys(names)
    options |= {} if splits == 1 else {"p_lse": None, "types": {"p_out": "*fp32"}}
    name = f"attention-{dtype}-{queries}x{head}" + f"-{splits} parts" * (splits > 1)
    kernels = {
        "": flash_attention.attention_kernel,
        "query": flash_attention_backward.query_gradient_kernel,
        "key": flash_attention_key_gradient.key_gradient_kernel,
        "bias": flash_attention_bias_gradient.bias_gradient_kernel,
    }
    return f"{name}-{feature}" + f"-gradient of {of}" * bool(of), kernels[of], dtype, options | given


def attention_cases() -> Iterator[Case]:
    """Prefill and decode, the heaviest first: a window, and a bias with a mask."""
    yield attention_case("bf16", 4096, 128, "window")
    yield attention_case("bf16", 8, 128, "window", splits=8)
    yield attention_case("bf16", 4096, 128, "bias, filled")
    yield attention_case("fp32", 4096, 128, "window")
    merge = {"UNIT": attention_tiles.LOG2_E, "ZERO_ROWS": False, "ROWS": decode_attention.MERGED_ROWS}
    merge |= {"BLOCK_DV": 128, "num_warps": 4}
    name, _, dtype, options = attention_case("bf16", 8, 128, "padded, packed", splits=8)
    streamed = {n: v for n, v in options.items() if n != "types"} | {"REQUESTS": 64}
    yield f"{name}-stream-k", stream_k_attention.stream_k_kernel, dtype, streamed
    yield "attention-merge", decode_attention.merge_parts_kernel, "bf16", merge
    lines = {n: v for n, v in merge.items() if n != "num_warps"} | {"VALUE_HEAD": 128, "REQUESTS": 64}
    lines |= {"MERGED": stream_k_merge.MERGED_ROWS, "ROWS": options["ROWS"]}
    yield "attention-merge lines", stream_k_merge.merge_lines_kernel, "bf16", lines
    yield attention_case("bf16", 8, 128, "redone", splits=8)
    unified = {n: v for n, v in options.items() if n != "types"} | {"PHI": 0.0}
    yield f"{name}-unified-max", unified_max_attention.unified_max_kernel, dtype, unified
    added = {n: v for n, v in merge.items() if n != "ZERO_ROWS"} | {"PHI": 0.0, "LEAST": 2.0**-60}
    yield "attention-add parts", unified_max_attention.add_parts_kernel, "bf16", added
    extents = {"MASK_OVER_KEYS": True, "KEYS": options["KEYS"], "QUERIES": 16}
    yield "attention-extents", stream_k_schedule.extents_kernel, "bf16", extents


def attention_gradient_cases() -> Iterator[Case]:
    """A training step of a causal model, and of a learned bias."""
    for of in ("query", "key"):
        yield attention_case("bf16", 4096, 128, "window", of=of)
    yield attention_case("bf16", 4096, 128, "bias, filled", of="bias")
    yield attention_case("bf16", 4096, 64, "dropout", of="key")
    rows = {"VALUE_HEAD": 128, "BLOCK_DV": 128, "ROWS": flash_attention_backward.DELTA_ROWS}
    delta = {**rows, "types": {"p_delta": "*fp32", "p_grad_lse": "*fp32"}}
    yield "attention-delta", flash_attention_backward.delta_kernel, "bf16", delta


def more_attention_gradient_cases() -> Iterator[Case]:
    for of in ("query", "key"):
        for feature in ("soft-cap, sinks", "padded, packed", "bias, filled", "anchors, prefix", "dropout"):
            yield attention_case("bf16", 4096, 128, feature, of=of)
        for dtype, head in (("bf16", 64), ("bf16", 80), ("bf16", 256), ("fp32", 64), ("fp32", 256)):
            yield attention_case(dtype, 4096, head, "window", of=of)
        yield attention_case("bf16", 4096, 256, "bias, filled", of=of)
    yield attention_case("bf16", 4096, 256, "bias, filled", of="bias")
    yield attention_case("fp32", 4096, 128, "bias, filled", of="bias")
    for feature in ("anchors, prefix", "dropout"):
        yield attention_case("bf16", 4096, 128, feature)


def block_sparse_cases() -> Iterator[Case]:
    """Over blocks of 64 keys, padded, and of 128."""
    for dtype, block, mask in (("bf16", 128, False), ("fp32", 64, True)):
        x = torch.empty(1, 1, 1, 128, dtype=DTYPES[dtype], device="meta")
        options = block_sparse_attention.options(x, x, block, 0.125, 0.0) | {"CAUSAL": True}
        options |= {"ZERO_ROWS": mask} | ({} if mask else {"p_mask": None})
        options |= {"types": {"p_index": "*i32", "p_count": "*i32", "p_seen": "*i8"}}
        tile = attention_tiles.tile_for(block, 128, DTYPES[dtype], dense=False, shared=True)
        cut = {"ROWS": min(block, tile.rows), "KEYS": min(block, tile.keys)}
        options |= {"shared": tile.options() | cut}
        kernel = block_sparse_attention.block_sparse_attention_kernel
        yield f"attention-blocks of {block}-{dtype}", kernel, dtype, options
    lists = {"CAUSAL": True, "STEP": block_sparse_attention.LISTED}
    lists |= {"types": {"p_blocks": "*u8", "p_index": "*i32", "p_count": "*i32"}}
    yield "attention-list of blocks", block_sparse_attention.list_blocks_kernel, "bf16", lists


def paged_case(dtype: str, queries: int, head: int, page: int, parts: bool = True) -> Case:
    query, pages = (
        torch.empty(s, dtype=DTYPES[dtype], device="meta")
        for s in ((1, 8, queries, head), (1, 1, page, head))
    )
    options = paged_attention.options(query, pages, pages, 0.125, 0.0)
    options |= {"DOT": tl.bfloat16 if dtype == "bf16" else tl.float32}
    options |= {"types": {"p_out": "*fp32"}} if parts else {"p_peak": None, "p_total": None}
    options |= {"shared": paged_attention.tile_of(query, pages, pages, shared=True).options()}
    name = f"attention-pages of {page}-{dtype}-{8 * queries}x{head}"
    return name, paged_attention.paged_attention_kernel, dtype, options


def paged_cases() -> Iterator[Case]:
    """A decode step, pages shorter than a tile and longer ones."""
    yield paged_case("bf16", 1, 128, 16)
    yield paged_case("fp32", 1, 128, 64)


def more_paged_cases() -> Iterator[Case]:
    """The tail of a prompt, the largest heads, and an odd page."""
    yield paged_case("bf16", 512, 128, 64, parts=False)
    for dtype, queries in (("bf16", 1), ("bf16", 512), ("fp32", 512)):
        yield paged_case(dtype, queries, 256, 16)
    yield paged_case("bf16", 1, 80, 7)


def more_attention_cases() -> Iterator[Case]:
    """The other features, head sizes (an odd one, the largest, two unequal) and numbers of rows."""
    for feature in ("soft-cap, sinks", "padded, packed"):
        yield attention_case("bf16", 4096, 128, feature)
    yield attention_case("bf16", 8, 128, "bias, filled", splits=8)
    for queries, head in ((4096, 64), (4096, 80), (4096, 256), (32, 128), (64, 64), (16, 256)):
        yield attention_case("bf16", queries, head, "window")
    yield attention_case("bf16", 4096, 192, "window", value_head=128)
    for queries, head in ((4096, 64), (4096, 256), (32, 128)):
        yield attention_case("bf16", queries, head, "bias, filled")
    for queries, head in ((4096, 64), (4096, 256), (8, 128)):
        yield attention_case("fp32", queries, head, "window")
    yield attention_case("fp32", 4096, 128, "bias, filled")
