"""Fuel, timing and dumps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effopt.errors import OptionError
from effopt.options import Options
from tests.plugins.planted import compiled, rule

aten = torch.ops.aten
RELU = rule("double-relu", lambda op, x: op.relu(x), lambda emit, m: emit(aten.clamp_min.default, m.x, 0))


def three(x: torch.Tensor) -> torch.Tensor:
    return (((x.relu() - 0.1).relu()) - 0.1).relu()


@pytest.mark.parametrize("fuel", [0, 1, 2, 3, 9])
def test_fuel_counts_rewrites(fuel: int) -> None:
    x = torch.randn(4, 4)
    report, result = compiled(three, (x,), [RELU], fuel=fuel)
    assert len(report.applied) == min(fuel, 3)
    assert report.checks["out of fuel"] == max(3 - fuel, 0)
    assert sum("out of fuel" in r.reason for r in report.rejected) == max(3 - fuel, 0)
    torch.testing.assert_close(result, three(x))


def test_a_rewrite_that_is_rolled_back_costs_no_fuel() -> None:
    wrong = rule("wrong", lambda op, x: op.sigmoid(x), lambda emit, m: emit(aten.tanh.default, m.x))
    report, _ = compiled(lambda x: three(x).sigmoid(), (torch.randn(4, 4),), [wrong, RELU], fuel=1)
    assert [a.pass_name for a in report.applied] == ["double-relu"]
    assert report.checks["failed"] == 1


@pytest.mark.parametrize("fuel", [-1, True, "3"])
def test_fuel_is_a_count(fuel: object) -> None:
    with pytest.raises(OptionError, match="fuel"):
        Options.parse({"fuel": fuel})


def test_seconds_of_a_pass_are_without_its_checks() -> None:
    report, _ = compiled(three, (torch.randn(64, 64),), [RELU], verify="always")
    seconds = report.seconds
    assert seconds["check"] > 0
    assert 0 < seconds["pass:double-relu"] < seconds["check"] + 1
    off, _ = compiled(three, (torch.randn(64, 64),), [RELU], verify="off")
    assert "check" not in off.seconds


def test_dumps_show_what_a_pass_changed(tmp_path: Path) -> None:
    silent = rule("silent", lambda op, x: op.tanh(x), lambda emit, m: emit(aten.relu.default, m.x))
    compiled(three, (torch.randn(4, 4),), [silent, RELU], dump=str(tmp_path))
    compiled(three, (torch.randn(4, 4),), [RELU], dump=str(tmp_path))
    first = sorted(p.name for p in (tmp_path / "graph0").iterdir())
    assert first == ["00-captured.txt", "02-double-relu.after.txt", "02-double-relu.before.txt"]
    assert (tmp_path / "graph1").is_dir()
    before = (tmp_path / "graph0" / "02-double-relu.before.txt").read_text()
    after = (tmp_path / "graph0" / "02-double-relu.after.txt").read_text()
    assert (before.count("aten.relu"), after.count("aten.relu")) == (3, 0)
    assert after.count("aten.clamp_min") == 3
    assert "float32[4, 4]" in before
