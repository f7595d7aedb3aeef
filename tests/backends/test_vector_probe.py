"""The compiler and the library are asked once, cheaply, and the answer is Inductor's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from torch._inductor import config, cpu_vec_isa
from torch._inductor.cpp_builder import get_cpp_compiler

from effopt.backends import vector_probe
from effopt.backends.vector_probe import SETTING, takes_vectors


def compiler_that_says(folder: Path, macros: str, status: int = 0) -> str:
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\nprintf '{macros}'\nexit {status}\n")
    script.chmod(0o755)
    return str(script)


def options_of(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What Inductor is told when a graph is compiled."""
    told: dict[str, Any] = {}

    def compile(module: Any, inputs: Any, options: Any) -> Any:
        told.update(options)
        return module.forward

    monkeypatch.setattr(torch._inductor, "compile", compile)
    torch._dynamo.reset()
    run = torch.compile(lambda x: x.tanh() + 1.0, backend="effopt", options=options or {})
    x = torch.randn(3, 5)
    torch.testing.assert_close(run(x), x.tanh() + 1.0)
    return told


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="this processor has no AVX2")
def test_agrees_with_the_program_of_inductor() -> None:
    """Where it trusts the compiler, Inductor's own program builds and loads."""
    if not takes_vectors(get_cpp_compiler()):
        pytest.skip("this compiler, or this PyTorch, is left to Inductor's program")
    assert cpu_vec_isa.VecAVX2().check_build(cpu_vec_isa.VecISA._avx_code)


@pytest.mark.parametrize(
    ("macros", "taken"),
    [
        ("#define __GNUC__ 12", True),
        ("#define __GNUC__ 9", False),
        ("#define __GNUC__ 4\\n#define __clang_major__ 15", True),
        ("#define __GNUC__ 14\\n#define __clang_major__ 11", False),
        ("#define OTHER 1", False),
        ("", False),
    ],
)
def test_age_of_the_compiler(
    macros: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_probe, "_exports_functions", lambda: True)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert takes_vectors(compiler_that_says(tmp_path, macros)) == taken


def test_a_compiler_that_fails_or_is_not_there(tmp_path: Path) -> None:
    assert not takes_vectors(compiler_that_says(tmp_path, "#define __GNUC__ 12", status=1))
    assert not takes_vectors(str(tmp_path / "none"))


def test_other_processors_are_left_to_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vector_probe, "_exports_functions", lambda: True)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not takes_vectors(compiler_that_says(tmp_path, "#define __GNUC__ 12"))


def test_a_library_without_the_functions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vector_probe, "_FUNCTIONS", ("Sleef_expf8_u10", "Sleef_no_such_function"))
    assert not takes_vectors(compiler_that_says(tmp_path, "#define __GNUC__ 12"))


@pytest.mark.parametrize("taken", [True, False])
def test_inductor_is_told(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effopt.backends.inductor.takes_vectors", lambda compiler: taken)
    told = options_of(monkeypatch)
    assert told.get(SETTING) == (True if taken else None)


def test_the_users_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effopt.backends.inductor.takes_vectors", lambda compiler: True)
    with config.patch({SETTING: False}):
        assert SETTING not in options_of(monkeypatch)
    assert SETTING not in options_of(monkeypatch, {"inductor": {"cpp.cxx": (None, "g++")}})
