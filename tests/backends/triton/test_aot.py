"""Every kernel compiles for every target without a GPU, and the binaries need what was planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SPILL_BYTES = 8
"""ptxas spills one or two registers of three float32 norm kernels on its own account, to stay at 32, 40 or 96
registers, with which one more program fits a multiprocessor. More than that is a tile too large."""
SHARED_BYTES = 32 * 1024
"""What a program may take for reductions and for turning layouts; the largest take exactly that, on gfx942
whose programs have 64 KiB. Below 48 KiB no target asks for an opt-in."""
MATRIX_SHARED_BYTES = 48 * 1024
"""A matrix kernel keeps the operands of its next two steps there as well."""


def compile_all() -> list[dict[str, Any]]:
    """What aot_compile.py reports. Triton caches the binaries, so only a changed kernel takes time."""
    script = Path(__file__).with_name("aot_compile.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[3]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_every_target() -> None:
    """In one test, so that workers of pytest-xdist do not each compile them all."""
    facts = compile_all()
    cases, targets = {fact["case"] for fact in facts}, {fact["target"] for fact in facts}
    assert targets == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(facts) == len(cases) * len(targets)
    for kernel in ("rms_norm", "layer_norm", "glu", "rope"):
        for dtype in ("bf16", "fp32"):
            found = [case for case in cases if case.startswith(kernel) and dtype in case]
            assert {"backward" in case for case in found} == {False, True}
    assert not [fact for fact in facts if fact["spill_bytes"] > SPILL_BYTES]
    assert sum(fact["spill_bytes"] > 0 for fact in facts) <= len(facts) // 50
    matrix = ("quantized_linear", "int8_linear")
    assert all(any(case.startswith(kernel) for case in cases) for kernel in matrix)
    for fact in facts:
        bound = MATRIX_SHARED_BYTES if fact["case"].startswith(matrix) else SHARED_BYTES
        assert fact["shared_bytes"] <= bound, fact
