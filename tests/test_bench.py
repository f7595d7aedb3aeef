"""The comparison: errors, ratios, and that each way is run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from effopt.bench import EAGER, Comparison, Measured, Ratio, Way, compare, effopt, relative_error
from effopt.errors import OptionError
from effopt.plugins.report import Report

EFFOPT = Way("effopt", effopt, {"lowering": "eager"})


def test_relative_error() -> None:
    a = torch.tensor([1.0, -4.0, 0.0])
    assert relative_error(a, a.clone()) == 0
    assert relative_error({"x": a + 0.4}, {"x": a}) == pytest.approx(0.1)
    assert relative_error([a, a * 2], [a, a]) == 1.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.empty(0), torch.empty(0)) == 0
    special = torch.tensor([math.nan, math.inf, 1.0])
    assert relative_error(special, special.clone()) == 0
    assert math.isnan(relative_error(torch.tensor([1.0, 1.0]), torch.tensor([math.nan, 1.0])))
    assert math.isnan(relative_error([a], [a, a]))


def test_speedup_is_taken_round_by_round() -> None:
    def way(name: str, *times: float) -> Measured:
        return Measured(name, 0.0, times, 0.0, Report())

    result = Comparison((way("slow", 2.0, 20.0, 4.0), way("fast", 1.0, 10.0, 1.0)), {})
    assert result.speedup("fast", "slow") == Ratio(2.0, 2.0, 3.0)
    assert result["slow"].latency_s == 4.0


@pytest.mark.parametrize("train", [False, True])
def test_ways_are_compared_on_one_model(train: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    told: list[str] = []
    result = compare(
        model,
        (torch.randn(3, 4),),
        ways=(EAGER, EFFOPT),
        rounds=3,
        sample_s=1e-4,
        train=train,
        progress=told.append,
    )
    assert [m.name for m in result.measured] == ["eager", "effopt"]
    assert result["eager"].compile_s == 0 < result["effopt"].compile_s
    assert result["effopt"].error < 1e-6
    assert result["effopt"].report.graphs[0].training is train
    assert result["effopt"].report.ops["linear"] == 2
    assert not result["eager"].report.graphs
    assert all(p.grad is None for p in model.parameters())
    assert "compiling with effopt" in told
    assert result.machine["torch"] == torch.__version__


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(OptionError, match="at least 3"):
        compare(nn.Identity(), rounds=2)
