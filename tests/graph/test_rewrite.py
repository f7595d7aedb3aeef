"""The driver: what every rewrite gets without asking, and what no rewrite can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effopt.graph.pattern import Named
from effopt.graph.values import shape_of
from effopt.graph.verify import check_graph
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


def run(planted: Rewrite, model: Any, *inputs: torch.Tensor) -> tuple[Any, Any]:
    trial = capture_example(Example(model, inputs))
    original = trial.copy()
    report = run_passes(trial, [planted], verify="always")
    assert not report.faults
    assert not disagreement(original, trial)
    return report, trial.module


def test_interior_values_that_others_read() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = x.tanh()
        return inner.relu(), inner

    made = rule(
        "r",
        lambda op, x: op.relu(op.tanh(x)),
        lambda e, m: e(aten.clamp_min.default, e(aten.tanh.default, m.x), 0),
    )
    report, module = run(made, model, torch.randn(3, 4))
    assert len(report.applied) == 1
    assert len(module.graph.find_nodes(op="call_function", target=aten.tanh.default)) == 2
    strict = type("Strict", (type(made),), {"may_duplicate": False})()
    report, _ = run(strict, model, torch.randn(3, 4))
    assert not report.applied
    assert "also used by output" in report.rejected[0].reason


@pytest.mark.parametrize(
    ("emitted", "words"),
    [
        (lambda e, m: e(aten.sum.dim_IntList, m.x, [-1]), "the result would be"),
        (lambda e, m: e(aten._to_copy.default, m.x, dtype=torch.float64), "it was torch.float32"),
    ],
)
def test_shape_and_dtype_are_kept(emitted: Any, words: str) -> None:
    report, _ = run(rule("r", lambda op, x: op.relu(x), emitted), lambda x: x.relu(), torch.randn(3, 4))
    assert not report.applied
    assert words in report.rejected[0].reason


def test_emitted_nodes_say_where_they_come_from() -> None:
    made = rule("r", lambda op, x: op.relu(x), lambda e, m: e(aten.clamp_min.default, m.x, 0))
    report, module = run(made, lambda x: x.relu() + 1, torch.randn(3, 4))
    (node,) = module.graph.find_nodes(op="call_function", target=aten.clamp_min.default)
    assert node.meta["effopt"] == ("r", "relu")
    assert __file__.split("/")[-1] in report.applied[0].source
    assert node.meta["val"].shape == (3, 4)


def test_definitions_precede_uses_afterwards() -> None:
    """The replacement stands at the root; a second output of it was read before the root."""

    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = x.tanh()
        early = first.neg()
        return early, first * y.sigmoid()

    def outputs(self: Any, m: Any) -> Any:
        return m.root, m.first

    def rewrite(emit: Any, m: Any) -> Any:
        first = emit(aten.tanh.default, m.x)
        return emit(aten.mul.Tensor, m.y, first), first

    made = rule("r", lambda op, x, y: op.mul(Named("first", op.tanh(x)), y), rewrite, outputs=outputs)
    report, module = run(made, model, torch.randn(3, 4), torch.randn(3, 4))
    assert len(report.applied) == 1
    module.graph.lint()
    check_graph(module, values=True)
