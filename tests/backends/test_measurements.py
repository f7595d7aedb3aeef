"""Which question is asked, and its answer, kept in a file."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config

import effopt
from effopt.backends import measured, measurements
from effopt.backends.base import Lowering
from effopt.backends.measured import Measurer
from effopt.graph import ops
from tests.backends.measuring import OPERANDS, REFERENCE, SDPA, Attention, ask, costing

pytestmark = pytest.mark.usefixtures("own_folder")


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
