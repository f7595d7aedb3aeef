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


def run_compared(function: Any, *inputs: Any, **settings: Any) -> tuple[Any, Report]:
    """`run_compiled`, whose result is that of eager."""
    out, report = run_compiled(function, *inputs, **settings)
    torch.testing.assert_close(out, function(*inputs), rtol=1e-5, atol=1e-5)
    return out, report


def reasons_of(report: Report, pass_name: str) -> str:
    """Why a pass left things alone."""
    return "; ".join(r.reason for r in report.rejected if r.pass_name == pass_name)


@pytest.fixture
def compiled() -> Callable[..., tuple[Any, Report]]:
    """`run_compiled`, for tests of passes."""
    return run_compiled
