"""The command line, as it is called: output, files, exit codes, and errors on one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from effopt import cli
from effopt.commands.model import NAMES, Size, load

TINY = ("--layers", "2", "--hidden", "32", "--heads", "4", "--tokens", "8", "--lowering", "eager")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call `effopt` with arguments; the exit code."""
    monkeypatch.setattr(sys, "argv", ["effopt", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for command in ("demo", "passes", "explain", "bench", "tune", "bisect", "plugins"):
        assert command in text


def test_passes_lists_and_shows_pages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "passes") == 0
    assert "recognize-rms-norm" in capsys.readouterr().out
    assert run(monkeypatch, "passes", "recognize-rms-norm") == 0
    text = capsys.readouterr().out
    assert "arXiv:1910.07467" in text
    assert "exact" in text


def test_explain_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, data, manifest = tmp_path / "r.html", tmp_path / "r.json", tmp_path / "m.json"
    files = ("--html", str(page), "--json", str(data), "--write-expect", str(manifest))
    assert run(monkeypatch, "explain", "llama", *TINY, *files) == 0
    text = capsys.readouterr().out
    assert "recognize-attention" in text
    assert "model.layers.{0..1}.self_attn" in text
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(data.read_text())["ops"]["attention"] == 2
    assert json.loads(manifest.read_text())["ops"]["attention"] == 2


def test_expect_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    manifest = tmp_path / "m.json"
    manifest.write_text('{"ops": {"attention": 2}}')
    assert run(monkeypatch, "explain", "llama", *TINY, "--expect", str(manifest)) == 0
    assert (
        run(
            monkeypatch,
            "explain",
            "llama",
            *TINY,
            "--expect",
            str(manifest),
            "--disable",
            "recognize-attention",
        )
        == 1
    )
    assert "attention: expected 2, got 0" in capsys.readouterr().err


def test_explain_a_function_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine_for_cli.py").write_text(
        "import torch\n"
        "def build():\n"
        "    return torch.nn.Linear(4, 4), (torch.randn(2, 4),), {}\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "explain", "mine_for_cli:build", "--lowering", "eager", "--train") == 0
    assert "training" in capsys.readouterr().out
    assert run(monkeypatch, "explain", "mine_for_cli:wrong") == 2
    assert "must return (model, args, kwargs), got int" in capsys.readouterr().err
    assert run(monkeypatch, "explain", "mine_for_cli:bild") == 2
    assert "Did you mean 'build'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explain", "lama"), "Did you mean 'llama'?"),
        (("explain", "os.path"), "or package.module:function or file.py:function"),
        (("explain", "no.such.module:f"), "cannot import 'no.such.module'"),
        (("explain", "os.path:splitext"), "os.path:splitext raised TypeError"),
        (("explain", "os:getcwd"), "must return (model, args, kwargs), got str"),
        (("explain", "platform:python_version_tuple"), "got (str, str, str)"),
        (("explain", "llama", "--attention", "egaer"), "Did you mean 'eager'?"),
        (("explain", "llama", "--hidden", "100", "--heads", "8"), "multiple of twice --heads"),
        (("explain", "llama", *TINY[:-2], "--lowering", "fast"), "Valid: auto, eager, measured, reference"),
        (
            ("explain", "llama", *TINY, "--passes", "recognize-attentoin"),
            "Did you mean 'recognize-attention'?",
        ),
        (("explain", "llama", *TINY, "--disable", "nothing"), "unknown pass to disable 'nothing'"),
        (("explain", "llama", *TINY, "--passes", "a{b"), "cannot read pipeline text"),
        (("explain", "llama", *TINY, "--expect", "missing.json"), "cannot read the manifest missing.json"),
        (("explain", "llama", *TINY, "--html", "page.txt"), ".json or .html"),
        (("explain", "llama", "--html", "nowhere/page.html"), "there is no folder 'nowhere'"),
        (("bisect", "llama", "--repro", "nowhere/repro.py"), "there is no folder 'nowhere'"),
        (("bench", "llama", "--json", "nowhere/b.json"), "there is no folder 'nowhere'"),
        (("demo", "--html", "nowhere/page.html"), "there is no folder 'nowhere'"),
        (("explain", "llama", "--layers", "0"), "--layers"),
        (("bench", "llama", "--rounds", "2"), "--rounds"),
        (("bench", "llama", "--passes", "nothing"), "unknown pass 'nothing'"),
        (("passes", "recognise-rms-norm"), "Did you mean 'recognize-rms-norm'?"),
        (("explian",), "explian"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_error_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert words in text
    assert "Traceback" not in text


@pytest.mark.parametrize("name", NAMES)
def test_named_architectures_are_built_to_size(name: str) -> None:
    example = load(name, Size(layers=2, hidden=32, heads=4, tokens=8))
    config = example.model.config
    assert config.num_hidden_layers == 2
    assert config.hidden_size == 32
    assert example.kwargs["input_ids"].shape == (1, 8)
    assert not example.model.training


def test_plugins_lists_what_each_registers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "plugins")
    text = capsys.readouterr().out
    assert "effopt.plugins.builtin" in text
    assert "attention (" in text
    assert "recognize-rms-norm" in text


def test_plugins_at_fault_give_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from effopt.plugins import manager

    class Broken:
        name, value = "broken", "broken_package:plugin"

        def load(self) -> object:
            raise ImportError("no module named broken_package")

    monkeypatch.setattr(manager, "_entry_points", lambda: (Broken(),))
    assert run(monkeypatch, "plugins") == 1
    assert "plugin 'broken' (broken_package:plugin) failed to load" in " ".join(
        capsys.readouterr().out.split()
    )


def test_bench_compares_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from effopt import bench

    # Eager against effopt's graph without Inductor: the command is tested, not the compilers.
    data = tmp_path / "bench.json"
    quick = bench.Way("inductor", bench.effopt, {"lowering": "eager"})
    monkeypatch.setattr(bench, "INDUCTOR", quick)
    monkeypatch.setattr(
        bench,
        "Way",
        lambda name, backend, options: bench.EAGER.__class__(name, backend, {**options, "lowering": "eager"}),
    )
    sizes = ("--layers", "1", "--hidden", "32", "--heads", "4", "--tokens", "8", "--rounds", "3")
    assert run(monkeypatch, "bench", "llama", *sizes, "--json", str(data)) == 0
    text = capsys.readouterr().out
    assert "against inductor" in text
    result = json.loads(data.read_text())
    assert [way["name"] for way in result["ways"]] == ["eager", "inductor", "effopt"]
    assert all(len(way["latencies_s"]) == 3 for way in result["ways"])
    assert result["ways"][2]["counts"]["recognize-attention"] == 1
    assert result["ways"][2]["error"] < 2e-5
    assert result["speedups"]["effopt over eager"]["median"] > 0


class PlantedPlugin:
    """A plugin with one wrong pass, as an installed package would bring it."""

    name, value = "planted", "planted:plugin"

    def load(self) -> object:
        from dataclasses import dataclass
        from typing import Any, ClassVar

        import torch

        from effopt import Rewrite, Stage, hookimpl

        @dataclass(frozen=True)
        class SinToCos(Rewrite):
            """sin(x) => cos(x), which is wrong."""

            name: ClassVar[str] = "sin-to-cos"
            stage: ClassVar[Stage] = Stage.CANONICALIZE

            def pattern(self, op: Any, x: Any) -> Any:  # type: ignore[override]
                return op.sin(x)

            def rewrite(self, emit: Any, m: Any) -> Any:
                return emit(torch.ops.aten.cos.default, m.x)

            def fingerprint(self) -> str:
                return "planted"

        class Plugin:
            @hookimpl
            def effopt_passes(self) -> list[type[Rewrite]]:
                return [SinToCos]

        return Plugin()


def test_bisect_finds_a_planted_wrong_rewrite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from effopt.plugins import manager

    (tmp_path / "waves_for_cli.py").write_text(
        "import torch\n"
        "class Wave(torch.nn.Module):\n"
        "    def forward(self, x, shift=0):\n"
        "        return torch.relu(x).tanh() + torch.sin(x + shift)\n"
        "def build():\n"
        "    return Wave(), (torch.randn(2, 4),), {'shift': 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "bisect", "waves_for_cli:build") == 0
    assert "no rewrite makes it differ" in capsys.readouterr().out
    monkeypatch.setattr(manager, "_entry_points", lambda: (PlantedPlugin(),))
    assert run(monkeypatch, "bisect", "waves_for_cli:build") == 1
    text = capsys.readouterr().out
    assert "is wrong: sin-to-cos" in text
    assert "waves_for_cli.py:4" in text
    assert "cos" in (tmp_path / "effopt_repro.py").read_text()


def test_page_of_passes_is_fresh() -> None:
    from effopt.commands.passes import as_markdown
    from effopt.plugins.manager import build_registry

    page = Path(__file__).parent.parent / "docs" / "passes.md"
    assert page.read_text() == as_markdown(build_registry()), "run `python docs/refresh.py`"
