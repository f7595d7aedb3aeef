"""Compile every kernel ahead of time for GPUs that are not here, and report what the binaries need.

    python tests/backends/triton/aot_compile.py [words that the case's name must hold]

Writes one JSON list: case, target, shared_bytes, registers, spill_bytes, and for CUDA how often the binary
has each kind of product of matrices. Runs without TRITON_INTERPRET, in a process of its own. For CUDA the
numbers are cuobjdump's (its stack is where ptxas spills to; no kernel here has arrays), for ROCm the metadata
that the assembler wrote.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pkgutil import iter_modules
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import effopt.backends.triton
from tests.backends.triton.aot_attention_cases import Case
from tests.backends.triton.aot_cases import CASES, MORE_CASES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = ("sm_90", "sm_100")
"""Whose matrix units read shared memory."""
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
        i
        for i, n in enumerate(kernel.arg_names)
        if n.startswith("p_") or n in ("d", "dv", "n", "k", "row_bytes")
    ]
    aligned += [i for i, n in enumerate(kernel.arg_names) if n.endswith("_stride")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if kernel.arg_names[i] not in constants}
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("_strides") and name != "decay_strides":
            attributes |= {(i, axis): [["tt.divisibility", 16]] for axis in range(3)}
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


PRODUCTS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
"""Out of shared memory on sm_90, on sm_100; and out of registers, which is what older targets have."""


def binary_facts(compiled: Any) -> dict[str, int]:
    """Registers and spilled bytes of a thread, and products of matrices, read from the binary."""
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
    facts = {"registers": int(found["REG"]), "spill_bytes": int(found["STACK"]) + int(found["LOCAL"])}
    return facts | {kind: compiled.asm["ptx"].count(name) for kind, name in PRODUCTS.items()}


def compile_case(name: str) -> list[dict[str, Any]]:
    """One case on all targets."""
    facts = []
    *head, common = CASES[name]
    for target_name, target in TARGETS.items():
        given = common | (common.get("shared", {}) if target_name in SHARED else {})
        options = {n: v for n, v in given.items() if n in ("num_warps", "num_stages")}
        options["enable_fp_fusion"] = True
        compiled = triton.compile(source_of((*head, given)), target=target, options=options)
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
