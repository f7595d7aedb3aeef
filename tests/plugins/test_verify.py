"""Planted bugs must be rolled back with a reason, and their right twins must be kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.passes.base import Rewrite
from effopt.plugins import verify
from tests.plugins.planted import compiled, rule
from tests.plugins.verify_plants import PLANTS, Plant, aten, norm_rule, randn, relu_pattern, rms_norm


@pytest.fixture(autouse=True)
def no_verdicts_yet() -> None:
    verify._VERDICTS.clear()


IDS = [plant.name for plant in PLANTS]


@pytest.mark.parametrize("plant", PLANTS, ids=IDS)
def test_a_right_rule_is_kept(plant: Plant) -> None:
    with torch.set_grad_enabled(plant.training):
        report, result = compiled(plant.model, plant.inputs, [plant.right])
    assert report.checks == {"verified": 1}, (report.rejected, report.unchecked, report.faults)
    assert len(report.applied) == 1
    if plant.complaint != "dropout":
        torch.testing.assert_close(result, plant.model(*plant.inputs))


@pytest.mark.parametrize("plant", PLANTS, ids=IDS)
def test_a_planted_bug_is_rolled_back(plant: Plant) -> None:
    with torch.set_grad_enabled(plant.training):
        report, result = compiled(plant.model, plant.inputs, [plant.wrong])
    assert set(report.checks) == {"failed"}, (report.applied, report.unchecked, report.faults)
    assert not report.applied
    (record,) = report.rejected
    assert plant.complaint in record.reason
    if plant.complaint != "dropout":
        torch.testing.assert_close(result, plant.model(*plant.inputs))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float64]
)
@pytest.mark.parametrize("plant", PLANTS[:9], ids=IDS[:9])
def test_other_dtypes(plant: Plant, dtype: torch.dtype) -> None:
    inputs = [i.to(dtype) if i.is_floating_point() else i for i in plant.inputs]
    kept, _ = compiled(plant.model, inputs, [plant.right])
    assert kept.checks == {"verified": 1}, (kept.rejected, kept.unchecked)
    back, _ = compiled(plant.model, inputs, [plant.wrong])
    assert set(back.checks) == {"failed"}, back.applied


def test_a_class_is_checked_once() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(rms_norm(rms_norm(x, w), w), w)

    report, _ = compiled(model, (randn(3, 16), randn(16)), [norm_rule("n", 1e-6)])
    assert report.checks == {"verified": 1, "cached": 2}
    assert report.seconds["check"] > 0
    every, _ = compiled(model, (randn(3, 16), randn(16)), [norm_rule("n", 1e-6)], verify="always")
    assert every.checks == {"verified": 3}
    off, _ = compiled(model, (randn(3, 16), randn(16)), [norm_rule("n", 0.0)], verify="off")
    assert not off.checks
    assert len(off.applied) == 3


def test_a_failed_class_stays_failed() -> None:
    report, _ = compiled(
        lambda x, w: rms_norm(rms_norm(x, w), w), (randn(3, 16), randn(16)), [norm_rule("n", 0.0)]
    )
    assert report.checks == {"failed": 2}
    assert len(report.rejected) == 2


@pytest.mark.parametrize(
    ("model", "inputs", "planted", "why"),
    [
        (
            lambda x: torch.bernoulli(x.sigmoid()) * 2,
            (randn(3, 3),),
            rule(
                "r",
                lambda op, x: op.mul(op.bernoulli(x), 2),
                lambda e, m: e(aten.mul.Tensor, e(aten.bernoulli.default, m.x), 2),
            ),
            "random numbers",
        ),
        (
            lambda x, y: x @ y,
            (randn(1200, 1200), randn(1200, 1200)),
            rule("b", lambda op, x, y: op.matmul(x, y), lambda e, m: e(aten.mm.default, m.x, m.y)),
            "GFLOP",
        ),
        (
            lambda x: x.relu(),
            (randn(2, 2),),
            rule("l", relu_pattern, lambda e, m: e(aten.abs.default, m.x), exact=False),
            "lossy",
        ),
    ],
    ids=["random", "too much work", "lossy"],
)
def test_what_is_not_checked_is_counted(model: Any, inputs: Any, planted: Rewrite, why: str) -> None:
    report, _ = compiled(model, inputs, [planted])
    assert report.checks == {"unchecked": 1}
    (reason,) = report.unchecked
    assert why in reason


def test_strides_and_expanded_operands() -> None:
    """A rule that is right for contiguous operands only is caught on the strides of the graph."""

    def wrong(emit: Any, m: Any) -> Any:
        return emit(aten.as_strided.default, emit(aten.relu.default, m.x), [4, 6], [6, 1])

    planted = rule("s", relu_pattern, wrong)
    kept, _ = compiled(lambda x: x.relu(), (randn(4, 6),), [planted])
    assert kept.checks == {"verified": 1}
    back, _ = compiled(lambda x: x.relu(), (randn(6, 4).t(),), [planted])
    assert back.checks == {"failed": 1}
    expanded, _ = compiled(
        lambda x: x.relu(),
        (randn(1, 6).expand(4, 6),),
        [rule("e", relu_pattern, lambda e, m: e(aten.clamp.default, m.x, 0.0))],
    )
    assert expanded.checks == {"verified": 1}


def test_dynamic_sizes() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, w) if x.shape[0] > 2 else x

    inputs = (randn(5, 16), randn(16))
    torch._dynamo.mark_dynamic(inputs[0], 0)
    report, _ = compiled(model, inputs, [norm_rule("n", 1e-6)])
    assert report.checks == {"verified": 1}
    report, _ = compiled(model, inputs, [norm_rule("n", 0.0)])
    assert report.checks == {"failed": 1}


def test_the_random_state_of_the_model_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    compiled(rms_norm, (torch.ones(3, 16), torch.ones(16)), [norm_rule("n", 1e-6)])
    torch.testing.assert_close(torch.rand(4), expected)


def test_rtol_replaces_the_table() -> None:
    loose, _ = compiled(PLANTS[2].model, PLANTS[2].inputs, [PLANTS[2].wrong], rtol=0.9)
    assert loose.checks == {"verified": 1}
    tight, _ = compiled(PLANTS[2].model, PLANTS[2].inputs, [PLANTS[2].wrong], rtol=1e-3)
    assert tight.checks == {"failed": 1}
