"""Every kernel compiles for every target without a GPU, and the binaries need what was planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SPILL_BYTES = 8
"""ptxas spills one or two registers of three float32 norm kernels on its own account, to stay at 32, 40 or 96
registers, with which one more program fits a multiprocessor. More than that is a tile too large."""
SHARED_BYTES = 32 * 1024
"""What a program may take for reductions and for turning layouts; the largest take exactly that, on gfx942
whose programs have 64 KiB. Below 48 KiB no target asks for an opt-in."""
MATRIX_SHARED_BYTES = 48 * 1024
"""A matrix kernel keeps the operands of its next two steps there as well."""
WALK_SHARED_BYTES = 64 * 1024
"""A walk over the tokens of linear attention has keys and values of two more chunks there."""
ATTENTION_SHARED_BYTES = {"sm_80": 96, "gfx942": 64, "sm_90": 160, "sm_100": 160}
"""KiB. Attention has the rows that it holds there too. Less than the 99 that a program may ask for on the
least of sm_8x, the 64 of gfx942, and the 227 of sm_90, where registers let one program in anyway."""
ATTENTION_SPILL_BYTES = 40
"""Its largest tiles take all 255 registers of sm_80, or 256 of gfx942, and up to five values more; and ptxas
puts ten away on its own account, with a bias at a head size of 256, to stay at 128."""

MATRIX = ("quantized_linear", "int8_linear", "attention", "linear_attention")


def compile_all(*words: str) -> list[dict[str, Any]]:
    """What aot_compile.py reports. Triton caches the binaries, so only a changed kernel takes time."""
    script = Path(__file__).with_name("aot_compile.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[3]), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), *words], env=environment, capture_output=True, text=True, timeout=600
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
    # Five of 312; the binaries of the sweep, which are 288 more of kernels that do not spill, are one in 50.
    assert sum(fact["spill_bytes"] > 0 for fact in facts) <= len(facts) // 50
    attention = [fact for fact in facts if fact["case"].startswith("attention")]
    assert_attention(attention)
    assert all(any(case.startswith(kernel) for case in cases) for kernel in MATRIX)
    assert_products_of_shared_memory(facts)
    assert_rows_and_products([fact for fact in facts if fact not in attention])


def assert_products_of_shared_memory(facts: list[dict[str, Any]]) -> None:
    """Prefill and chunks of tokens, in 16 bits, are cut so that the units of sm_90 and sm_100 can be used."""
    whole = ("attention-bf16-4096x128-window", "attention-blocks of 128-bf16")
    chunks = tuple(f"linear_attention-{kernel}-bf16-128" for kernel in ("states", "chunk", "gradient"))
    for target, kind in (("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        found = [fact for fact in facts if fact["target"] == target]
        cut = [fact for fact in found if fact["case"] in whole or fact["case"].startswith(chunks)]
        assert len(cut) == 7
        assert [fact for fact in cut if fact["mma"] or not fact[kind]] == []


def assert_rows_and_products(facts: list[dict[str, Any]]) -> None:
    """Hardly a spill, and little shared memory."""
    assert not [fact for fact in facts if fact["spill_bytes"] > SPILL_BYTES]
    for fact in facts:
        case = fact["case"].removeprefix("more-")
        bound = MATRIX_SHARED_BYTES if case.startswith(MATRIX) else SHARED_BYTES
        bound = WALK_SHARED_BYTES if case.startswith("linear_attention-states") else bound
        assert fact["shared_bytes"] <= bound, fact


def assert_attention(facts: list[dict[str, Any]]) -> None:
    """Spills and shared memory are bounded."""
    assert facts
    assert not [fact for fact in facts if fact["spill_bytes"] > ATTENTION_SPILL_BYTES]
    for fact in facts:
        assert fact["shared_bytes"] <= 1024 * ATTENTION_SHARED_BYTES[fact["target"]], fact


@pytest.mark.slow
def test_rows_and_products_of_other_sizes() -> None:
    """Of kernels that the first test compiles too: 288 binaries more."""
    words = ("norm", "glu", "rope", "quantized", "linear_attention")
    facts = [fact for word in words for fact in compile_all("more", word)]
    assert len(facts) == 4 * (18 + 8 + 4 + 10 + 32)
    assert sum(fact["spill_bytes"] > 0 for fact in facts) <= len(facts) // 50
    assert_rows_and_products(facts)


@pytest.mark.slow
def test_attention_of_all_features_and_sizes() -> None:
    """Each takes ptxas seconds."""
    facts = compile_all("more-attention")
    assert len({fact["case"] for fact in facts}) == 48
    assert_attention(facts)
