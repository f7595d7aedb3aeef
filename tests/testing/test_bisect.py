"""Bisection finds the planted rewrite and writes a program that shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from effopt.testing.bisect import bisect, make_from, write_repro
from tests.plugins.planted import rule

aten = torch.ops.aten


class Model(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in (1.0, 2.0, 3.0, 4.0, 5.0):
            x = (x * scale).sigmoid()
        return x


def wrong_for_four() -> Any:
    """Right for every factor but one."""

    def rewrite(emit: Any, m: Any) -> Any:
        by = m.by + (0.5 if m.by == 4.0 else 0.0)
        return emit(aten.sigmoid.default, emit(aten.mul.Tensor, m.x, by))

    return rule("planted", lambda op, x, by: op.sigmoid(op.mul(x, by)), rewrite)


def test_it_finds_the_planted_rewrite(tmp_path: Path) -> None:
    said: list[str] = []
    make = make_from(Model(), (torch.randn(3, 4),))
    culprit = bisect(make, {"pipeline": [wrong_for_four()]}, say=said.append)
    assert culprit is not None
    assert culprit.applied.pass_name == "planted"
    # Roots are visited from the last: factors 5, 4, 3, ...
    assert culprit.fuel == 2
    assert culprit.runs == len(said) + 1 <= 6
    assert "relative error" in culprit.error
    write_repro(culprit, tmp_path / "repro.py")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "repro.py")],
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "4.5" in culprit.repro
    assert "largest difference" in done.stdout


def test_a_right_model_has_no_culprit() -> None:
    right = rule("right", lambda op, x: op.sigmoid(x), lambda e, m: e(aten.sigmoid.default, m.x))
    assert bisect(make_from(Model(), (torch.randn(3, 4),)), {"pipeline": [right]}) is None


def test_a_fault_that_no_rewrite_makes() -> None:
    class Random(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(3, 4)

    with pytest.raises(ValueError, match="no rewrite is at fault"):
        bisect(make_from(Random(), (torch.randn(3, 4),)), {"pipeline": ""})
