"""Lowerings chosen by running them: which is taken, and what a graph says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import effopt
from effopt.backends import measured, measurements
from effopt.backends.base import Choice, Lowering, choose
from effopt.backends.block_attention import LOWERINGS as BLOCKS
from effopt.backends.made_up_operands import made_up, made_up_call
from effopt.backends.measured import Measurer
from effopt.graph import ops
from tests.backends.measuring import CPU, OPERANDS, REFERENCE, SDPA, Attention, ask, costing

pytestmark = pytest.mark.usefixtures("own_folder")


def chosen(measure: Any, *costs: tuple[str, float]) -> Choice:
    candidates = [costing(name, cost) for name, cost in costs]
    return choose(candidates, CPU, OPERANDS, OPERANDS["query"], False, measure=measure)


def test_the_fastest_of_those_that_are_near() -> None:
    asked: list[list[str]] = []

    def measure(lowerings: Sequence[Lowering]) -> Mapping[str, float | str]:
        asked.append([lowering.name for lowering in lowerings])
        return {"a": 3e-6, "b": 2e-6, "c": "RuntimeError: no"}

    choice = chosen(measure, ("a", 1e-6), ("b", 4e-6), ("c", 2e-6), ("far", 4.1e-6))
    assert asked == [["a", "b", "c"]]
    assert choice.lowering.name == "b"
    assert dict(choice.refused) == {
        "a": "measured 3.0 us, b 2.0 us",
        "c": "could not be measured: RuntimeError: no",
        "far": "predicted to take over 4 times the least, and so not measured",
    }


def test_the_prediction_decides_where_nothing_was_measured() -> None:
    choice = chosen(lambda lowerings: "no time is left", ("a", 2e-6), ("b", 1e-6))
    assert choice.lowering.name == "b"
    assert choice.refused == (("a", "predicted to take longer than b, and not measured: no time is left"),)
    choice = chosen(lambda lowerings: dict.fromkeys("ab", "OutOfMemoryError"), ("a", 2e-6), ("b", 1e-6))
    assert (choice.lowering.name, choice.refused[0][1]) == ("b", "could not be measured: OutOfMemoryError")


def test_one_candidate_is_not_measured() -> None:
    def measure(lowerings: Sequence[Lowering]) -> Mapping[str, float]:
        raise AssertionError(lowerings)

    choice = chosen(measure, ("a", 1e-6), ("far", 5e-6))
    assert choice.lowering.name == "a"
    assert choice.refused == (("far", "predicted 5.0 us, a 1.0 us"),)


@pytest.mark.parametrize("where", ["made_up_call", "stopwatch"])
def test_what_fails_beside_the_candidates_leaves_the_choice_to_the_predictions(
    where: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for the operands, for instance; a graph compiles all the same, and its budget is spent."""

    def fails(*_: Any) -> Any:
        raise MemoryError("no memory\nat all")

    monkeypatch.setattr(measured, where, fails)
    monkeypatch.setattr(measured, "_runnable", lambda *_: lambda: None)
    measurer = Measurer()
    assert ask([SDPA, REFERENCE], measurer) == "MemoryError: no memory"
    assert measurer.spent_s > 0
    assert list(own_folder.iterdir()) == []


def test_made_up_operands() -> None:
    """Sizes, dtypes and strides of the node; lengths that differ; two documents; codes."""
    cache = torch.zeros(3, 9, 2, 4, dtype=torch.float16).transpose(1, 2)
    made = made_up(cache)
    assert (made.shape, made.stride(), made.dtype) == (cache.shape, cache.stride(), cache.dtype)
    mask = made_up(torch.ones(3, 1, 1, 9, dtype=torch.bool))
    assert mask.sum(-1).flatten().tolist() == [3, 6, 9]
    assert made_up(torch.zeros(5, dtype=torch.bool)).all()
    assert made_up(torch.zeros(2, 6, dtype=torch.int64)).tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert made_up(torch.zeros(1, 6).expand(4, 6)).stride() == (0, 1)
    assert made_up(torch.zeros(4, dtype=torch.int8)).dtype == torch.int8
    assert made_up(7) == 7


def test_an_op_may_say_what_operands_hold() -> None:
    """Pages that are there, and requests of different lengths: integers alone would be neither."""
    pool, q = torch.zeros(20, 2, 4, 8), torch.zeros(3, 2, 1, 8)
    args = (q, pool, pool, torch.zeros(3, 5, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    made = made_up_call(ops.paged_attention, ops.paged_attention.bind(args, {"scale": 1.0}))
    assert made["lengths"].tolist() == [7, 14, 20]
    assert sorted(made["page_table"].unique().tolist()) == sorted(made["page_table"].flatten().tolist())
    assert made["key_pages"].std() > 0.5
    assert made["scale"] == 1.0


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_graph_is_measured_and_says_so(
    training: bool, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal values and gradients; real candidates, compiled by Inductor, once; random numbers as without."""
    monkeypatch.setattr(measured, "ROUNDS", 3)
    count: list[int] = []
    run: Callable[..., Any] = measured._race
    monkeypatch.setattr(measured, "_race", lambda *given: count.append(1) or run(*given))
    monkeypatch.setattr("effopt.backends.base.NEAR", 1e9)
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(6, 8)
    before = torch.get_rng_state()
    with effopt.record() as report, torch.set_grad_enabled(training):
        compiled = torch.compile(model, backend="effopt", options={"lowering": "measured"})
        got = compiled(x)
    assert torch.equal(torch.get_rng_state(), before)
    (record,) = [r for r in report.lowerings if r.op == "attention"]
    assert any(reason.startswith("measured ") for _, reason in record.refused)
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
    if training:
        (gradient,) = torch.autograd.grad(got.sum(), [model.line.weight])
        torch.testing.assert_close(gradient, torch.autograd.grad(model(x).sum(), [model.line.weight])[0])
    assert count
    files, measured_once = len(list(own_folder.iterdir())), len(count)
    assert files == measured_once
    measurements.forget()
    with torch.set_grad_enabled(training):
        again = effopt.explain(model, x, options={"lowering": "measured"})
    assert len(count) == measured_once
    assert again.lowerings == report.lowerings


def test_blocks_are_candidates() -> None:
    """What reads its operands' contents has some to read."""
    ids = torch.zeros(1, 8, dtype=torch.int64)
    found = ask([BLOCKS[0], REFERENCE], query_ids=ids, key_ids=ids)
    assert all(isinstance(seconds, float) for seconds in found.values())
