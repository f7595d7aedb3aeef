"""Kernels run compiled on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it is set before anything imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")


@pytest.fixture
def device() -> torch.device:
    """Where the kernels of this process run."""
    from triton.runtime.interpreter import InterpretedFunction

    from effopt.backends.triton.glu import glu_kernel

    if isinstance(glu_kernel, InterpretedFunction):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.fail("the kernels were imported before TRITON_INTERPRET=1 was set: set it for the whole run")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def unwritten_is_nan(device: torch.device, request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` holds NaN, so that an element which no program wrote is found."""
    if device.type == "cpu":
        request.getfixturevalue("empty_is_nan")
    torch.manual_seed(0)
    yield
