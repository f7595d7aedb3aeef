"""Lowerings chosen by running them: what is asked, what is kept, and what a graph says of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch.nn import functional as F

import effopt
from effopt.backends import measured, measurements
from effopt.backends.base import Choice, Lowering, choose
from effopt.backends.block_attention import LOWERINGS as BLOCKS
from effopt.backends.made_up_operands import made_up, made_up_call
from effopt.backends.measured import Measurer
from effopt.backends.native import LOWERINGS as NATIVE
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.target import target_of

CPU = target_of(torch.device("cpu"))
SDPA, REFERENCE = NATIVE[0], reference_lowering(ops.attention)
OPERANDS = ops.attention.bind(tuple(torch.zeros(1, 2, 8, 4) for _ in range(3)), {"scale": 0.5})


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing known yet, and a folder of this test."""
    measurements.forget()
    monkeypatch.setattr(measurements, "folder", lambda: tmp_path)
    yield tmp_path
    measurements.forget()


def costing(name: str, seconds: float) -> Lowering:
    return Lowering(ops.attention, name, SDPA.call, lambda t, o: None, lambda t, o, r: seconds)


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


def ask(lowerings: Sequence[Lowering], measurer: Measurer | None = None, **changed: Any) -> Any:
    bound = {**OPERANDS, **changed}
    return (measurer or Measurer()).of(bound, bound["query"])(lowerings)


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Who ran, each time; without running anything."""
    ran: list[list[str]] = []

    def race(lowerings: Sequence[Lowering], *_: Any) -> dict[str, float | str]:
        ran.append([lowering.name for lowering in lowerings])
        return {lowering.name: 1e-6 * (len(ran) + i) for i, lowering in enumerate(lowerings)}

    monkeypatch.setattr(measured, "_race", race)
    return ran


def test_measured_once_and_then_known(races: list[list[str]], own_folder: Path) -> None:
    first = ask([SDPA, REFERENCE])
    assert ask([SDPA, REFERENCE]) == first
    measurements.forget()
    assert ask([SDPA, REFERENCE]) == first
    assert races == [["sdpa", "reference"]]
    assert len(list(own_folder.iterdir())) == 1


def test_what_makes_another_question(races: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates, shapes, strides, dtypes, numbers, gradients, all settings of Inductor, versions."""
    q = OPERANDS["query"]
    node = torch.fx.Graph().placeholder("q")
    node.meta["val"] = q
    ask([SDPA, REFERENCE])
    ask([SDPA, costing("other", 1.0)])
    ask([SDPA, REFERENCE], scale=0.25)
    ask([SDPA, REFERENCE], query=torch.zeros(1, 2, 9, 4))
    ask([SDPA, REFERENCE], query=q.mT.contiguous().mT)
    ask([SDPA, REFERENCE], query=q.half())
    ask([SDPA, REFERENCE], Measurer(frozenset([node])), query=node)
    ask([SDPA, REFERENCE], Measurer(settings={"max_autotune": True}))
    for last in (0, 1):
        ask([SDPA, REFERENCE], Measurer(settings={"cpp.simdlen": [*range(100), last]}))
    with config.patch(max_autotune=True):
        ask([SDPA, REFERENCE])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    ask([SDPA, REFERENCE])
    monkeypatch.setattr(torch, "__version__", "99.0")
    ask([SDPA, REFERENCE])
    assert len(races) == 13


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"format": 1}',
        '{"format": 1, "question": "another", "seconds": {"sdpa": 1}}',
        "SAME NaN", "SAME none", "SAME text", "SAME one", "SAME others",
    ],
)  # fmt: skip
def test_a_file_that_is_no_answer_is_ignored_and_written_anew(
    text: str, races: list[list[str]], own_folder: Path
) -> None:
    good = ask([SDPA, REFERENCE])
    (path,) = own_folder.iterdir()
    entry = json.loads(path.read_text())
    wrong: dict[str, Any] = {
        "SAME NaN": {"sdpa": float("nan"), "reference": 1.0}, "SAME none": {}, "SAME one": {"sdpa": 1.0},
        "SAME text": {"sdpa": "fast", "reference": 1.0}, "SAME others": {"spda": 1.0, "reference": 1.0},
    }  # fmt: skip
    path.write_text(json.dumps(entry | {"seconds": wrong[text]}) if text in wrong else text)
    measurements.forget()
    again = ask([SDPA, REFERENCE])
    assert len(races) == 2
    assert again != good
    measurements.forget()
    assert ask([SDPA, REFERENCE]) == again
    assert [p.suffix for p in own_folder.iterdir()] == [".json"]


def test_of_several_writers_the_first_decides(own_folder: Path) -> None:
    answers: list[dict[str, float]] = []
    question = {"op": "x", "lowerings": {"a": "its source"}}
    threads = [
        threading.Thread(target=lambda i=i: answers.append(measurements.keep(question, {"a": 1.0 + i})))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measurements.forget()
    assert answers == [measurements.recall(question)] * 8
    assert len(list(own_folder.iterdir())) == 1


def test_an_answer_may_be_read_by_whom_the_umask_lets(races: list[list[str]], own_folder: Path) -> None:
    """As other files of the folder: else a cache that several users share is measured anew by each."""
    ask([SDPA, REFERENCE])
    (own_folder / "other").touch()
    kept, other = sorted(own_folder.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert kept.stat().st_mode == other.stat().st_mode


def test_a_folder_that_cannot_be_written_is_reported(
    races: list[list[str]], own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folder / "file").write_text("")
    monkeypatch.setattr(measurements, "folder", lambda: own_folder / "file")
    measurer = Measurer()
    first = ask([SDPA, REFERENCE], measurer)
    assert "lost with this process" in measurer.faults[0]
    assert ask([SDPA, REFERENCE]) == first
    assert len(races) == 1


def test_bounds(races: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of time and of memory: beyond them the prediction decides, and the reason is given."""
    assert "60 s" in ask([SDPA, REFERENCE], Measurer(spent_s=60.0))
    huge = torch.empty(1, 2, 40_000, 4, device="meta")
    assert "GiB" in ask([SDPA, REFERENCE], query=huge, key=huge, value=huge)
    assert races == []


def test_what_fails_is_not_kept(own_folder: Path) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    failing = Lowering(ops.attention, "broken", broken, lambda t, o: None, lambda t, o, r: 1.0)
    found = ask([failing, SDPA])
    assert "no such kernel" in found["broken"]
    assert found["sdpa"] > 0
    assert list(own_folder.iterdir()) == []


@pytest.mark.parametrize("where", ["made_up_call", "_stopwatch"])
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


class Attention(torch.nn.Module):
    """Plain, so that the library kernel and the reference compete."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.line(x).view(1, -1, 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).sum(1)


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


def test_symbols_are_measured_at_their_hints(
    own_folder: Path, races: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effopt.backends.base.NEAR", 1e9)
    model = Attention()
    for length in (6, 7):
        x = torch.randn(length, 8)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad(), effopt.record() as report:
            got = torch.compile(model, backend="effopt", options={"lowering": "measured"})(x)
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
    assert report.graphs == []
    assert races
    assert any("6" in p.read_text() for p in own_folder.iterdir())


def test_blocks_are_candidates() -> None:
    """What reads its operands' contents has some to read."""
    ids = torch.zeros(1, 8, dtype=torch.int64)
    found = ask([BLOCKS[0], REFERENCE], query_ids=ids, key_ids=ids)
    assert all(isinstance(seconds, float) for seconds in found.values())
