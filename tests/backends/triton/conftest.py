"""Kernels run compiled on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
KERNEL_MODULES = [
    f"effopt.backends.triton.{path.stem}"
    for path in sorted((Path(__file__).parents[3] / "effopt" / "backends" / "triton").glob("[!_]*.py"))
]


def interpret_all_kernels() -> None:
    """Make every jitted function one of the interpreter, whenever it was defined.

    TRITON_INTERPRET is read when a function is decorated, and Triton's own are by the time that another test
    imported Dynamo. So the variable alone does not reach them in a run of the whole suite.
    """
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    language = [triton.language, triton.language.standard, triton.language.random]
    for module in (*language, *map(importlib.import_module, KERNEL_MODULES)):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


if not torch.cuda.is_available():
    interpret_all_kernels()


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of this process run."""
    return torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")


@pytest.fixture(autouse=True)
def unwritten_is_nan(device: torch.device, request: pytest.FixtureRequest) -> None:
    """`torch.empty` holds NaN, so that an element which no program wrote is found."""
    if device.type == "cpu":
        request.getfixturevalue("empty_is_nan")
    torch.manual_seed(0)
