"""No graph holds a symbol: an emitted symbolic size becomes a node, or the rewrite is refused."""

from __future__ import annotations

from typing import Any

import torch

from effopt.graph.values import shape_of
from effopt.passes.base import Example, Rewrite
from effopt.testing import capture_example, disagreement, run_passes
from tests.plugins.planted import rule

aten = torch.ops.aten


def flatten_rule(size: Any) -> Rewrite:
    return rule(
        "sized",
        lambda op, x: op.relu(x),
        lambda e, m: e(aten.relu.default, e(aten.expand.default, m.x, size(m))),
    )


def trial_of(planted: Rewrite) -> Any:
    trial = capture_example(Example(lambda x: x.relu(), (torch.randn(3, 5),)), dynamic=True)
    original = trial.copy()
    report = run_passes(trial, [planted], verify="always")
    assert not disagreement(original, trial)
    return report


def test_a_size_of_an_operand_is_read_from_it() -> None:
    report = trial_of(flatten_rule(lambda m: list(shape_of(m.x))))
    assert len(report.applied) == 1
    assert not report.faults


def test_another_size_is_refused() -> None:
    report = trial_of(flatten_rule(lambda m: [shape_of(m.x)[0], shape_of(m.x)[1] // 2 * 2]))
    assert not report.applied
    (refusal,) = report.rejected
    assert "symbolic" in refusal.reason
