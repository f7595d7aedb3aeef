"""Compile every kernel ahead of time for GPUs that are not here, and report what the binaries need.

    python tests/backends/triton/aot_compile.py [words that the case's name must hold]

Writes one JSON list: case, target, shared_bytes, registers, spill_bytes. Runs without TRITON_INTERPRET,
in a process of its own. For CUDA the numbers are cuobjdump's (its stack is where ptxas spills to; no
kernel here has arrays), for ROCm the metadata that the assembler wrote.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pkgutil import iter_modules
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import effopt.backends.triton
from effopt.backends.triton import (
    attention_gradients,
    attention_tiles,
    block_sparse_attention,
    decode_attention,
    flash_attention,
    flash_attention_backward,
    flash_attention_bias_gradient,
    flash_attention_key_gradient,
    glu,
    int8_linear,
    layer_norm,
    linear_attention,
    linear_attention_backward,
    linear_attention_call,
    paged_attention,
    quantized_linear,
    rms_norm,
    rope,
    rows,
    selective_scan,
    stream_k_attention,
    stream_k_merge,
    stream_k_schedule,
    unified_max_attention,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
TYPES = {"p_packed": "*u8", "p_zero": "*u8", "p_codes": "*i8", "p_signed": "*i8", "p_token_scale": "*fp32"}
TYPES |= {
    "p_states": "*fp32",
    "p_dstates": "*fp32",
    "p_first": "*fp32",
    "p_last": "*fp32",
    "p_ddecay": "*fp32",
}
TYPES |= {"p_mask": "*u8", "p_query_ids": "*i64", "p_key_ids": "*i64", "p_extents": "*i32", "p_seed": "*i64"}
TYPES |= {"p_table": "*i32", "p_lengths": "*i32", "p_redo": "*i8"}
TYPES |= dict.fromkeys(("p_sum", "p_lse", "p_grad_lse", "p_peak", "p_total", "p_delta", "p_spoiled"), "*fp32")
"""Pointers to something else than the dtype of a case."""
Case = tuple[str, Any, str, dict[str, Any]]
"""Name, kernel, dtype of what pointers point to, launch options: constexprs, num_warps, more `types`."""


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
    tile = attention_tiles.tile_for(queries, longer, DTYPES[dtype], dense)
    if of:
        tile = attention_gradients.backward_tile_for(of, longer, DTYPES[dtype], dense)
    options |= {"BLOCK_D": blocks[0], "BLOCK_DV": blocks[1], **tile.options()}
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
        options |= {} if mask else {"p_mask": None}
        options |= {"types": {"p_index": "*i32", "p_count": "*i32", "p_seen": "*i8"}}
        kernel = block_sparse_attention.block_sparse_attention_kernel
        yield f"attention-blocks of {block}-{dtype}", kernel, dtype, options


def paged_case(dtype: str, queries: int, head: int, page: int, parts: bool = True) -> Case:
    query, pages = (
        torch.empty(s, dtype=DTYPES[dtype], device="meta")
        for s in ((1, 8, queries, head), (1, 1, page, head))
    )
    options = paged_attention.options(query, pages, pages, 0.125, 0.0)
    options |= {"DOT": tl.bfloat16 if dtype == "bf16" else tl.float32}
    options |= {"types": {"p_out": "*fp32"}} if parts else {"p_peak": None, "p_total": None}
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


def linear_attention_cases() -> Iterator[Case]:
    """The heaviest: decay of each token, heads of 128; and float32, summed without matrix units."""
    forward, backward, call = linear_attention, linear_attention_backward, linear_attention_call
    for dtype, head in (("bf16", 128), ("fp32", 64)):
        wide = tl.bfloat16 if dtype == "bf16" else tl.float32
        chunk = call.chunk_for(DTYPES[dtype])
        options = {"SCALE": 0.125, "HEAD": head, "BLOCK_D": head, "BLOCK_DV": call.VALUES, "CHUNK": chunk}
        options |= {"DOT": wide, "WIDE": wide, "num_warps": call.WARPS, "num_stages": call.STAGES}
        tail = f"{dtype}-{head}"
        for reverse in (False, True):
            name = f"linear_attention-states-{tail}" + "-reverse" * reverse
            yield name, forward.states_kernel, dtype, options | {"REVERSE": reverse}
            name = f"linear_attention-chunk-{tail}" + "-reverse" * reverse
            yield name, forward.chunk_kernel, dtype, options | {"REVERSE": reverse}
        options |= {"BLOCK_DV": backward.GRADIENT_VALUES}
        yield f"linear_attention-gradient-{tail}", backward.gradient_kernel, dtype, options


ROW_CASES = tuple(row_cases())
MATRIX_CASES = (
    *(*quantized_linear_cases(), *int8_linear_cases(), *attention_cases()),
    *(
        *block_sparse_cases(),
        *paged_cases(),
        *scan_cases(),
        *linear_attention_cases(),
        *attention_gradient_cases(),
    ),
)
MORE_CASES = {
    f"more-{case[0]}": case
    for case in (
        *(*more_row_cases(), *quantized_linear_cases(is_more=True)),
        *(*more_attention_cases(), *more_attention_gradient_cases(), *more_paged_cases()),
    )
}
"""Compiled only where a word asks for them: `more` does."""
CASES = {case[0]: case for case in (*ROW_CASES, *MATRIX_CASES)} | MORE_CASES


def source_of(case: Case) -> ASTSource:
    """The kernel with its argument types as the launcher would see them: aligned pointers, int32."""
    _, kernel, dtype, options = case
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("p_dweight", "p_dbias"):
            signature[name] = "*fp64" if dtype == "fp64" else "*fp32"
        elif name.startswith("p_"):
            signature[name] = (TYPES | options.get("types", {})).get(name, f"*{dtype}")
        elif name == "decay_strides":
            signature[name] = ("i32", "i32", "i32")
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32", "constexpr")
            constants[kernel.arg_names.index(name), 3] = 1
        else:
            signature[name] = "i32"
    aligned = [
        i for i, n in enumerate(kernel.arg_names) if n.startswith("p_") or n in ("d", "n", "k", "row_bytes")
    ]
    aligned += [i for i, n in enumerate(kernel.arg_names) if n.endswith("_stride")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if kernel.arg_names[i] not in constants}
    for i, name in enumerate(kernel.arg_names):
        if name in ("query_strides", "key_strides", "value_strides"):
            attributes |= {(i, axis): [["tt.divisibility", 16]] for axis in range(3)}
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def binary_facts(compiled: Any) -> dict[str, int]:
    """Registers and spilled bytes of a thread, read from the binary."""
    if "amdgcn" in compiled.asm:
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
        # Scalar registers spill to lanes of vector registers, and those to the private segment.
        spilled = int(found["private_segment_fixed_size"])
        return {"registers": int(found["vgpr_count"]), "spill_bytes": spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(found["REG"]), "spill_bytes": int(found["STACK"]) + int(found["LOCAL"])}


def compile_case(name: str) -> list[dict[str, Any]]:
    """One case on all targets."""
    facts = []
    for target_name, target in TARGETS.items():
        options = {n: v for n, v in CASES[name][3].items() if n in ("num_warps", "num_stages")}
        options["enable_fp_fusion"] = True
        compiled = triton.compile(source_of(CASES[name]), target=target, options=options)
        fact = {"case": name, "target": target_name, "shared_bytes": compiled.metadata.shared}
        facts.append(fact | binary_facts(compiled))
    return facts


def kernels_without_a_case() -> set[str]:
    """Kernels of effopt that nothing here compiles."""
    package = effopt.backends.triton
    modules = (import_module(m.name) for m in iter_modules(package.__path__, f"{package.__name__}."))
    kernels = {k for module in modules for k in vars(module).items() if k[0].endswith("_kernel")}
    compiled = {case[1] for case in CASES.values()}
    return {name for name, kernel in kernels if kernel not in compiled}


def main() -> None:
    missing = kernels_without_a_case()
    if missing:
        raise SystemExit(f"no case compiles {', '.join(sorted(missing))}")
    words = sys.argv[1:]
    names = [
        name for name in CASES if all(word in name for word in words) and (words or name not in MORE_CASES)
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        facts = [fact for found in pool.map(compile_case, names) for fact in found]
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
