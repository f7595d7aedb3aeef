"""From a call to its launches without a GPU: nothing waits for the device, and what is launched compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.backends.triton.launches import (
    CALLS,
    DECODES,
    FIRST,
    FLASH,
    attend,
    differentiate,
    heads,
    look_up,
    recorded,
    select,
    walk,
)

SHARED_BYTES = 227 * 1024
"""What a program may have of sm_90; test_aot.py has tighter bounds for each family, and more targets."""
SPILL_BYTES = 40
"""As in test_aot.py."""
LONG = {
    "prefill": lambda: attend(FLASH, heads(64, 128, 8, 32768, 32768, 128), is_causal=True),
    "prefill of 128k": lambda: attend(FLASH, heads(1, 32, 8, 131072, 131072, 128), low=-1023, high=0),
    "gradients": lambda: differentiate(heads(8, 64, 8, 32768, 32768, 128), is_causal=True),
    **{name: lambda op=op: attend(op, heads(64, 32, 8, 1, 2**20, 128)) for name, op in DECODES.items()},
    "pages": lambda: look_up(1024, 128, 8, 1, 2**20),
    "blocks": lambda: select(heads(1, 64, 64, 131072, 131072, 128), 64),
    "walk": lambda: walk(64, 64, 131072, 128, None),
}
"""Calls of more elements than 32 bits count."""


def compile_calls(target: str, *names: str) -> list[dict[str, Any]]:
    """What launches.py reports, in a process without the interpreter."""
    script = Path(__file__).with_name("launches.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[3]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), target, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", [*CALLS, *LONG])
def test_no_launch_waits_for_the_device(name: str, shared: bool) -> None:
    """A tensor of `meta` has no values to read. Programs are on one axis, which holds 2**31 of them."""
    with recorded(shared) as launches:
        (CALLS | LONG)[name]()
    assert launches
    assert all(0 < made.programs < 2**31 for made in launches)


def test_what_is_launched_compiles() -> None:
    """Far strides have 64 bits, and a batch, a head, a token of one is a constant."""
    facts = compile_calls("sm_90", *FIRST)
    assert {fact["call"] for fact in facts} == set(FIRST)
    far = next(fact for fact in facts if fact["call"] == "flash, far")
    assert far["types"].count("('i64', 'i64', 'i64', 'constexpr')") == 3
    assert_fits(facts)


@pytest.mark.slow
def test_all_that_is_launched_compiles() -> None:
    facts = compile_calls("sm_90")
    assert {fact["call"] for fact in facts} == set(CALLS)
    assert_fits(facts)


def assert_fits(facts: list[dict[str, Any]]) -> None:
    assert [fact for fact in facts if fact["shared_bytes"] > SHARED_BYTES] == []
    assert [fact for fact in facts if fact["spill_bytes"] > SPILL_BYTES] == []
