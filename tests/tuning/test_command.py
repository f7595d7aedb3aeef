"""`effopt tune`, as it is typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import effopt
from effopt.cli import main

MODEL = """
import torch
from effopt.testing.quality import Text
from tests.models.architectures import build


def made():
    draw = torch.Generator().manual_seed(0)
    texts = [Text(str(i), torch.randint(100, (40,), generator=draw)) for i in range(4)]
    return build("llama")[0], texts
"""
ARGUMENTS = (
    "lm.py:made",
    "--context",
    "16",
    "--windows",
    "4",
    "--passes",
    "quantize-weights{include=*_proj}",
)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["effopt", "tune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lm.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_is_printed_and_saved(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--save", "plan.json", "--json", "report.json")
    assert run(monkeypatch, *ARGUMENTS, "--budget", "kl<=0.01", *files) == 0
    printed = capsys.readouterr()
    assert "14 of 14 choices accepted within kl<=0.01" in printed.out
    assert "model.layers.1.mlp.up_proj" in printed.out
    assert "include=*_proj does not name it" in " ".join(printed.out.split())
    assert "measuring each choice alone ..." in printed.err
    plan = effopt.Plan.load("plan.json")
    report = json.loads((here / "report.json").read_text())
    assert report["compressed"]["validation"]["kl"] <= 0.01
    assert sum(c["is_accepted"] for c in report["choices"]) == 14
    compiled = torch.compile(build_again(), backend="effopt", options={"plans": plan, "lowering": "eager"})
    with torch.no_grad(), effopt.record() as record:
        compiled(torch.ones(1, 4, dtype=torch.long))
    assert record.ops["quantized_linear"] == 14


def build_again() -> torch.nn.Module:
    from tests.models.architectures import build

    return build("llama")[0]


def test_an_impossible_budget_is_said_and_is_exit_code_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *ARGUMENTS, "--budget", "bits_per_byte<=0.1", "--save", "plan.json") == 1
    assert "Nothing fits bits_per_byte<=0.1: for the uncompressed model" in capsys.readouterr().out
    assert effopt.Plan.load("plan.json").sections == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "kl>=1"), "kl is bounded with <="),
        (("--budget", "kl<=1", "--save", "nowhere/plan.json"), "cannot write 'nowhere/plan.json'"),
        (("--budget", "kl<=1", "--objective", "joules"), "unknown objective 'joules'"),
        (("--budget", "kl<=1", "--passes", "quantise-weights"), "Did you mean 'quantize-weights'"),
    ],
)
def test_bad_input_is_one_error_and_exit_code_2(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert run(monkeypatch, *ARGUMENTS, *arguments) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
