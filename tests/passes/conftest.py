"""Compiling one function or model with effopt, without Inductor, and what was done to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from effopt.compile import effopt, record
from effopt.plugins.report import Report


def run_compiled(
    function: Any, *inputs: Any, dynamic: bool | None = None, **options: Any
) -> tuple[Any, Report]:
    """The result of `function(*inputs)` under effopt without Inductor, and the report."""
    torch._dynamo.reset()
    settings = {"lowering": "eager", **options}

    def backend(module: Any, example_inputs: Any) -> Any:
        return effopt(module, example_inputs, options=settings)

    with record() as report:
        out = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    return out, report


@pytest.fixture
def compiled() -> Callable[..., tuple[Any, Report]]:
    """`run_compiled`, for tests of passes."""
    return run_compiled
