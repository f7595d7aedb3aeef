"""What FlexAttention as a lowering refuses, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from effopt.graph import ops
from effopt.target import Target
from tests.backends.test_flex_attention import CPU, FLEX, HKV, LOWEST, H, S, T, operands, taken, wants_avx

pytestmark = wants_avx


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sinks": ({"high": 0, "sinks": torch.zeros(H)}, "log-sum-exp"),
    "dropout": ({"high": 0, "dropout_p": 0.1}, "no dropout"),
    "nothing to skip": ({"mask": torch.ones(T, S, dtype=torch.bool)}, "nothing would be skipped"),
    "small fill": ({"high": 0, "fill": -1e4}, "fill with -inf"),
    "bias and fill": ({"high": 0, "fill": LOWEST, "bias": torch.zeros(T, S)}, "a bias, and a mask"),
    "causal and fill": ({"is_causal": True, "low": -4, "fill": LOWEST}, "causal, and a mask"),
    "wide bias": ({"high": 0, "bias": torch.zeros(T, S, dtype=torch.float64)}, "the bias is float64"),
}


@pytest.mark.parametrize("name", REFUSED)
@taken
def test_refusal(name: str) -> None:
    kwargs, reason = REFUSED[name]
    said = FLEX.supports(CPU, ops.attention.bind(tuple(operands()), {"scale": 1.0, **kwargs}))
    assert said is not None
    assert reason in said


@taken
def test_operands_and_targets_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(inputs: list[Tensor], target: Target = CPU) -> str:
        return str(FLEX.supports(target, ops.attention.bind(tuple(inputs), {"scale": 1.0, "high": 0})))

    assert "takes one of" in said(operands(torch.float64))
    assert "one query" in said(operands(t=1))
    assert "4 dimensions, got 3" in said([x[0, :HKV] for x in operands()])
    assert "a size that is 0" in said([x[:0] for x in operands()])
    assert "on a CPU only" in said(operands(), Target("cuda", "sm_90", 1.0, 1.0))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in said(operands())


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))
    said = FLEX.supports(CPU, ops.attention.bind(tuple(operands()), {"scale": 1.0, "high": 0}))
    assert said == "FlexAttention's CPU kernel was checked from torch 2.13 on, this is 2.12.1+cpu"
