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
from multiprocessing import get_context
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effopt.backends.triton import glu, int8_linear, layer_norm, quantized_linear, rms_norm, rope, rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
TYPES = {"p_packed": "*u8", "p_zero": "*u8", "p_codes": "*i8", "p_signed": "*i8", "p_token_scale": "*fp32"}
"""Pointers to something else than the dtype of a case."""
Case = tuple[str, Any, str, dict[str, Any]]
"""Name, kernel, dtype of what pointers point to, launch options: constexprs, num_warps, more `types`."""


def norm_cases() -> Iterator[Case]:
    for dtype, length in (
        ("bf16", 128),
        ("bf16", 4096),
        ("bf16", rows.MAX_ROW),
        ("fp32", 100),
        ("fp32", rows.MAX_ROW),
        ("fp64", rows.MAX_ROW_FLOAT64),
    ):
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


def glu_cases() -> Iterator[Case]:
    for activation in glu.ACTIVATIONS:
        for dtype in ("bf16", "fp32") if activation in ("silu", "gelu") else ("bf16",):
            options = {
                "ACTIVATION": activation,
                "ACC": tl.float32,
                "BLOCK": glu.BLOCK,
                "num_warps": glu.WARPS,
            }
            yield f"glu-{activation}-{dtype}", glu.glu_kernel, dtype, options
            yield f"glu_backward-{activation}-{dtype}", glu.glu_backward_kernel, dtype, options


def rope_cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for interleaved in (False, True):
            for backward in (False, True):
                options = {"INTERLEAVED": interleaved, "BACKWARD": backward, "ACC": tl.float32}
                options |= {
                    "ROWS": 16,
                    "PAIRS": 64,
                    "REST": 64 if interleaved else 0,
                    "num_warps": rope.WARPS,
                }
                name = f"rope-{dtype}" + "-interleaved" * interleaved + "-backward" * backward
                yield name, rope.rope_kernel, dtype, options


def tile_options(tile: quantized_linear.MatrixTile) -> dict[str, Any]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "num_warps": tile.warps}


def quantized_linear_cases() -> Iterator[Case]:
    """One row, k divided; and many rows. Tiles in one group, and across groups with zeros."""
    for dtype, dot in (("bf16", tl.bfloat16), ("fp32", tl.float32)):
        for bits in quantized_linear.BITS:
            for m in (1, 512):
                for aligned in (True, False):
                    options = tile_options(quantized_linear.tile_for(m, DTYPES[dtype]))
                    options |= {"BITS": bits, "ALIGNED": aligned, "STEPS": 16, "DOT": dot}
                    options |= {"p_zero": None} if aligned else {}
                    options |= {"p_bias": None, "types": {"p_out": "*fp32"}} if m == 1 else {}
                    name = f"quantized_linear-{dtype}-{bits}-{m}" + "-aligned" * aligned
                    yield name, quantized_linear.quantized_linear_kernel, dtype, options


def int8_linear_cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        tokens = {"STEPS": 4, "BLOCK": int8_linear.BLOCK, "num_warps": int8_linear.WARPS}
        yield f"int8_linear-tokens-{dtype}", int8_linear.quantize_tokens_kernel, dtype, tokens
        for m in (1, 512):
            options = tile_options(int8_linear.tile_for(m)) | {"PARTS": 8 if m == 1 else 1, "STEPS": 16}
            options |= {"p_bias": None, "types": {"p_out": "*i32"}} if m == 1 else {}
            yield f"int8_linear-{dtype}-{m}", int8_linear.int8_linear_kernel, dtype, options


ROW_CASES = (*norm_cases(), *glu_cases(), *rope_cases())
CASES = {case[0]: case for case in (*ROW_CASES, *quantized_linear_cases(), *int8_linear_cases())}


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
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def binary_facts(compiled: Any) -> dict[str, int]:
    """Registers and spilled bytes of a thread, read from the binary."""
    if "amdgcn" in compiled.asm:
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
        spilled = int(found["vgpr_spill_count"]) * 4 + int(found["sgpr_spill_count"]) * 4
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
        options = {"num_warps": CASES[name][3]["num_warps"], "enable_fp_fusion": True}
        compiled = triton.compile(source_of(CASES[name]), target=target, options=options)
        fact = {"case": name, "target": target_name, "shared_bytes": compiled.metadata.shared}
        facts.append(fact | binary_facts(compiled))
    return facts


def main() -> None:
    names = [name for name in CASES if all(word in name for word in sys.argv[1:])]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        facts = [fact for found in pool.map(compile_case, names) for fact in found]
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
