"""All kernels to compile ahead of time: what each is compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton.language as tl

from effopt.backends.triton import (
    glu,
    int8_linear,
    layer_norm,
    linear_attention,
    linear_attention_backward,
    linear_attention_call,
    linear_attention_channels,
    linear_attention_step,
    quantized_linear,
    rms_norm,
    rope,
    rows,
    selective_scan,
)
from tests.backends.triton.aot_attention_cases import (
    DTYPES,
    Case,
    attention_cases,
    attention_gradient_cases,
    block_sparse_cases,
    more_attention_cases,
    more_attention_gradient_cases,
    more_paged_cases,
    paged_cases,
)


def norm_cases(*sizes: tuple[str, int]) -> Iterator[Case]:
    for dtype, length in sizes:
        forward = {"EPS": 1e-6, **rows.tile_for(length).options(DTYPES[dtype])}
        backward = {"EPS": 1e-6, **rows.tile_for(length, backward=True).options(DTYPES[dtype])}
        rounding = {"OFFSET": 1.0, "ROUND_FIRST": True}
        alone = {"p_residual": None, "p_total": None}
        tail = f"{dtype}-{length}"
        yield f"rms_norm-{tail}", rms_norm.rms_norm_kernel, dtype, {**forward, **rounding, **alone}
        yield f"add_rms_norm-{tail}", rms_norm.rms_norm_kernel, dtype, {**forward, **rounding}
        yield f"rms_norm_backward-{tail}", rms_norm.rms_norm_backward_kernel, dtype, {**backward, **rounding}
        yield f"layer_norm-{tail}", layer_norm.layer_norm_kernel, dtype, {**forward, **alone}
        yield f"add_layer_norm-{tail}", layer_norm.layer_norm_kernel, dtype, forward
        yield f"layer_norm_backward-{tail}", layer_norm.layer_norm_backward_kernel, dtype, backward


def glu_cases(*kinds: tuple[str, str]) -> Iterator[Case]:
    for activation, dtype in kinds:
        options = {"ACTIVATION": activation, "ACC": tl.float32, "BLOCK": glu.BLOCK, "num_warps": glu.WARPS}
        yield f"glu-{activation}-{dtype}", glu.glu_kernel, dtype, options
        yield f"glu_backward-{activation}-{dtype}", glu.glu_backward_kernel, dtype, options


def rope_cases(*kinds: tuple[str, bool]) -> Iterator[Case]:
    for dtype, interleaved in kinds:
        for backward in (False, True):
            options = {"INTERLEAVED": interleaved, "BACKWARD": backward, "ACC": tl.float32, "ROWS": 16}
            options |= {"PAIRS": 64, "REST": 64 if interleaved else 0, "num_warps": rope.WARPS}
            name = f"rope-{dtype}" + "-interleaved" * interleaved + "-backward" * backward
            yield name, rope.rope_kernel, dtype, options


def row_cases() -> Iterator[Case]:
    """The longest rows, every op forward and backward in two dtypes."""
    yield from norm_cases(("bf16", 4096), ("fp32", rows.MAX_ROW), ("fp64", rows.MAX_ROW_FLOAT64))
    yield from glu_cases(("silu", "bf16"), ("gelu", "fp32"), ("gelu_tanh", "bf16"))
    yield from rope_cases(("bf16", False), ("fp32", True))


def more_row_cases() -> Iterator[Case]:
    """Short and odd rows, and the rest of the products."""
    yield from norm_cases(("bf16", 128), ("bf16", rows.MAX_ROW), ("fp32", 100))
    yield from glu_cases(("silu", "fp32"), ("gelu", "bf16"), ("relu", "bf16"), ("sigmoid", "bf16"))
    yield from rope_cases(("bf16", True), ("fp32", False))


def tile_options(tile: quantized_linear.MatrixTile) -> dict[str, Any]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "num_warps": tile.warps}


def quantized_linear_case(dtype: str, bits: int, m: int, aligned: bool) -> Case:
    """One row, k divided; and many rows. Tiles in one group, and across groups with zeros."""
    options = tile_options(quantized_linear.tile_for(m, DTYPES[dtype]))
    options |= {"BITS": bits, "ALIGNED": aligned, "STEPS": 16}
    options |= {"DOT": tl.bfloat16 if dtype == "bf16" else tl.float32}
    options |= {"p_zero": None} if aligned else {}
    options |= {"p_bias": None, "types": {"p_out": "*fp32"}} if m == 1 else {}
    name = f"quantized_linear-{dtype}-{bits}-{m}" + "-aligned" * aligned
    return name, quantized_linear.quantized_linear_kernel, dtype, options


def quantized_linear_cases(is_more: bool = False) -> Iterator[Case]:
    """The products of the kinds; without `is_more` half of those in bfloat16, and the heaviest in float32."""
    for dtype, bits, m, aligned in product(("bf16", "fp32"), quantized_linear.BITS, (1, 512), (True, False)):
        heavy = bits == 4 and m == 512 and not aligned
        is_first = (m == 512) == aligned or heavy if dtype == "bf16" else heavy
        if is_first != is_more:
            yield quantized_linear_case(dtype, bits, m, aligned)


def int8_linear_cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        tokens = {"STEPS": 4, "BLOCK": int8_linear.BLOCK, "num_warps": int8_linear.WARPS}
        yield f"int8_linear-tokens-{dtype}", int8_linear.quantize_tokens_kernel, dtype, tokens
        for m in (1, 512):
            options = tile_options(int8_linear.tile_for(m)) | {"PARTS": 8 if m == 1 else 1, "STEPS": 16}
            options |= {"p_bias": None, "types": {"p_out": "*i32"}} if m == 1 else {}
            yield f"int8_linear-{dtype}-{m}", int8_linear.int8_linear_kernel, dtype, options


def scan_cases() -> Iterator[Case]:
    """The state of Mamba, and the largest."""
    total = {
        f"p_{name}": "*fp32" for name in ("last", "kept", "grad_last", "scratch", "da", "db", "dc", "dstart")
    }
    for dtype, n in (("bf16", 16), ("fp32", selective_scan.MAX_STATE)):
        options = {"CHUNK": selective_scan.CHUNK, "CHANNELS": selective_scan.channels_for(n)}
        options |= {"STATE": n, "ACC": tl.float32, "num_warps": selective_scan.WARPS, "types": total}
        kernel = selective_scan.selective_scan_kernel
        yield f"selective_scan-{dtype}-{n}", kernel, dtype, options | {"p_start": None}
        yield (
            f"selective_scan_backward-{dtype}-{n}",
            selective_scan.selective_scan_backward_kernel,
            dtype,
            options,
        )


def token_decay_cases(dtype: str, head: int) -> Iterator[Case]:
    """Decay of each token, through the two kernels of both passes, and that of the other gradients."""
    forward, backward, call = linear_attention, linear_attention_backward, linear_attention_call
    of = (DTYPES | {"fp16": torch.float16})[dtype]
    wide = tl.bfloat16 if dtype == "bf16" else tl.float32
    states = f"*{'bf16' if dtype == 'bf16' else 'fp32'}"
    options = {"SCALE": 0.125, "HEAD": head, "BLOCK_D": head, "WIDE": wide}
    options |= {"DOT": tl.float16 if dtype == "fp16" else wide}
    options |= {"CHUNK": call.chunk_for(of, by_channel=False), "BY_CHANNEL": False}
    options |= {"num_warps": call.WARPS, "num_stages": call.STAGES}
    options |= {"types": dict.fromkeys(("p_states", "p_dstates"), states)}
    walk = {"BLOCK_DV": call.walk_columns_for(of, head, head), "num_stages": call.STATE_STAGES}
    chunks = {"BLOCK_DV": call.chunk_columns_for(of, head, head)}
    for reverse in (False, True):
        own, tail = {"REVERSE": reverse}, f"{dtype}-{head}" + "-reverse" * reverse
        yield f"linear_attention-states-{tail}", forward.states_kernel, dtype, options | walk | own
        yield f"linear_attention-chunk-{tail}", forward.chunk_kernel, dtype, options | chunks | own
    options |= backward.gradient_options(of)
    yield f"linear_attention-gradient-{dtype}-{head}", backward.gradient_kernel, dtype, options


def linear_attention_cases() -> Iterator[Case]:
    """The heaviest, heads of 128; and those of float16, whose products with states are of float32."""
    for dtype in ("bf16", "fp16"):
        yield from token_decay_cases(dtype, 128)


def more_linear_attention_cases() -> Iterator[Case]:
    for dtype, head in (("fp32", 128), ("fp32", 64), ("fp16", 64), ("bf16", 64)):
        yield from token_decay_cases(dtype, head)


def channel_gate_cases(dtype: str, of_backward: bool) -> Iterator[Case]:
    """Gates of channels, in tiles of any head; `of_backward`: the two kernels of both passes, turned."""
    call, channels = linear_attention_call, linear_attention_channels
    of = DTYPES | {"fp16": torch.float16}
    wide, chunk = tl.bfloat16 if dtype == "bf16" else tl.float32, call.chunk_for(of[dtype], by_channel=True)
    options = {"SCALE": 0.125, "HEAD": 128, "CHUNK": chunk, "WIDE": wide, "DOT": wide, "BY_CHANNEL": True}
    options |= {"LEVELS": chunk.bit_length() - 1, "num_warps": call.WARPS, "num_stages": call.STAGES}
    states = "*bf16" if dtype == "bf16" else "*fp32"
    types = {"p_decay": "*fp32", **dict.fromkeys(("p_states", "p_dstates"), states)}
    options |= {"REVERSE": of_backward, "types": types}
    state = {
        "BLOCK_D": channels.STATE_CHANNELS,
        "BLOCK_DV": call.walk_columns_for(of[dtype], 128, 128),
    }
    state |= {"num_warps": channels.STATE_WARPS}
    tile = {"BLOCK_D": channels.CHANNELS, "BLOCK_DV": channels.columns_for(of[dtype], 128)}
    tail = f"{dtype}-channel" + "-reverse" * of_backward
    yield f"linear_attention-states-{tail}", linear_attention.states_kernel, dtype, options | state
    yield f"linear_attention-chunk-{tail}", channels.channel_chunk_kernel, dtype, options | tile
    if not of_backward:
        tile |= {"BLOCK_DV": channels.GRADIENT_VALUES, "num_warps": channels.GRADIENT_WARPS}
        yield f"linear_attention-gradient-{tail}", channels.channel_gradient_kernel, dtype, options | tile
        step = dict.fromkeys(("HEAD", "BLOCK_D"), linear_attention_step.MAX_HEAD)
        step |= {"BLOCK_DV": linear_attention_step.COLUMNS}
        yield f"linear_attention-step-{tail}", linear_attention_step.step_kernel, dtype, options | step


def more_channel_gate_cases() -> Iterator[Case]:
    yield from channel_gate_cases("bf16", of_backward=True)
    yield from channel_gate_cases("fp32", of_backward=False)
    yield from channel_gate_cases("fp32", of_backward=True)
    yield from channel_gate_cases("fp16", of_backward=False)


ROW_CASES = tuple(row_cases())
MATRIX_CASES = (
    *(*quantized_linear_cases(), *int8_linear_cases(), *attention_cases()),
    *(
        *block_sparse_cases(),
        *paged_cases(),
        *scan_cases(),
        *linear_attention_cases(),
        *channel_gate_cases("bf16", of_backward=False),
        *attention_gradient_cases(),
    ),
)
MORE_CASES = {
    f"more-{case[0]}": case
    for case in (
        *(*more_row_cases(), *quantized_linear_cases(is_more=True)),
        *(*more_channel_gate_cases(), *more_linear_attention_cases()),
        *(*more_attention_cases(), *more_attention_gradient_cases(), *more_paged_cases()),
    )
}
"""Compiled only where a word asks for them: `more` does."""
CASES = {case[0]: case for case in (*ROW_CASES, *MATRIX_CASES)} | MORE_CASES
