"""`effopt bench quality` as it is called: tables, files, exit codes, and what is refused before any work."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import effopt
from effopt import cli
from effopt.commands.bench_quality import DEFAULT, ways_of
from effopt.pipeline import resolve
from effopt.plugins.manager import build_registry

ROOT = Path(__file__).parent.parent
TINY_LM = ROOT / "examples" / "tiny_lm"
INT8, NO_SUCH = "quantize-weights{bits=8}", "skip-layers{layers=[9]}"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call `effopt bench` with arguments; the exit code."""
    monkeypatch.setattr(sys, "argv", ["effopt", "bench", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A random Llama of bytes and a text, in the working directory."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=256,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    (tmp_path / "held_out.txt").write_text("what the model has not seen " * 3)
    monkeypatch.chdir(tmp_path)
    return "llama"


def test_tables_files_and_a_row_that_failed(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--json", "q.json", "--html", "q.html", "--png", "q.png")
    rows = ("--passes", INT8, "--passes", NO_SUCH, "--passes", INT8)
    eagerly = ("--lowering", "eager", "--rounds", "3")
    assert run(monkeypatch, "quality", checkpoint, "--texts", "held_out.txt", *rows, *eagerly, *files) == 1
    captured = capsys.readouterr()
    text = " ".join(captured.out.split())
    for words in ("KL, nats a token", "bits per byte", "tokens/s", "best KL for its", "failed: OptionError"):
        assert words in text
    for words in ("1 of 3: uncompressed", "2 of 3: quantize-weights{bits=8}", "timing"):
        assert words in captured.err
    data = json.loads(Path("q.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["uncompressed", INT8, NO_SUCH]
    assert data["rows"][2]["error"].startswith("OptionError: skip-layers: there is no layer 9")
    picture = Path("q.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 20_000
    page = Path("q.html").read_text()
    assert page.startswith("<!doctype html>")
    assert 'src="data:image/png;base64,iVBOR' in page
    assert INT8 in page
    assert "there is no layer 9" in page
    assert not {"<script", "http://", "https://"} & set(page.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--passes", "skip-layer"), "Did you mean 'skip-layers'?"),
        (("--passes", " "), "names no pass"),
        (("--plan", "missing.json"), "there is no plan 'missing.json'"),
        (("--plan", "held_out.txt"), "this is not a plan"),
        (("--json", "nowhere/q.json"), "cannot write 'nowhere/q.json': there is no folder 'nowhere'"),
        (("--json", "q.txt"), "'q.txt': expected a path that ends in .json"),
        (("--html", "q.json"), "expected a path that ends in .html"),
        (("--png", "llama.png"), "cannot write 'llama.png': is a folder"),
        (("--rounds", "2"), "--rounds"),
        (("--dtype", "int4"), "Valid: bfloat16, float16, float32"),
        (("--texts", "nothing.txt"), "--texts 'nothing.txt' names no file"),
        (("--lowering", "fast"), "Valid: auto, eager, measured, reference"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_error_before_the_work(
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    Path("llama.png").mkdir()
    texts = () if "--texts" in arguments else ("--texts", "held_out.txt")
    assert run(monkeypatch, "quality", checkpoint, *texts, *arguments) == 2
    captured = capsys.readouterr()
    assert words in " ".join(captured.err.split())
    assert "compiling" not in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("kind", ["png", "html"])
def test_a_picture_needs_matplotlib(
    kind: str,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(monkeypatch, "quality", checkpoint, "--texts", "held_out.txt", f"--{kind}", f"q.{kind}") == 2
    error = capsys.readouterr().err
    assert "a picture needs matplotlib: pip install 'effopt[plot]'" in error
    assert "loading" not in error


def test_a_folder_that_cannot_be_written_to(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("effopt.commands.output_file.os.access", lambda *_: False)
    assert run(monkeypatch, "quality", checkpoint, "--json", "q.json") == 2
    assert "cannot write 'q.json': permission denied" in capsys.readouterr().err


def test_bench_is_two_commands_and_speed_needs_no_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "speed" in text
    assert "quality" in text
    for arguments in (("llama",), ("speed", "llama"), ("--hidden", "64", "llama"), ()):
        assert run(monkeypatch, *arguments, "--rounds", "2") == 2
        assert "effopt bench speed" in capsys.readouterr().err
    assert run(monkeypatch, "lama") == 2
    assert "Did you mean 'llama'?" in capsys.readouterr().err


def test_rows_by_default_exist_and_plans_are_rows(tmp_path: Path) -> None:
    registry = build_registry()
    assert [way.passes for way in ways_of([], [])] == list(DEFAULT)
    for text in DEFAULT:
        assert resolve(text, registry), text
    plan = effopt.Plan(())
    plan.save(tmp_path / "p.json")
    (way,) = ways_of([], [str(tmp_path / "p.json")] * 2)
    assert way.plan == plan
    assert way.name == f"plan {tmp_path / 'p.json'}"
    assert [way.name for way in ways_of([INT8], [str(tmp_path / "p.json")])] == [
        INT8,
        f"plan {tmp_path}/p.json",
    ]


@pytest.fixture
def tiny_lm(tmp_path: Path) -> str:
    """The trained model, said to have a context of 128: an eighth of the work."""
    folder = tmp_path / "tiny"
    shutil.copytree(TINY_LM / "checkpoint", folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    return str(folder)


@pytest.mark.slow
def test_four_bits_are_worse_than_eight_on_a_trained_model(
    tiny_lm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = [str(TINY_LM / name) for name in ("data.py", "model.py")]
    passes = (INT8, "quantize-weights{bits=4,group=32}", "quantize-weights{bits=4,group=256}")
    arguments = [*(w for t in texts for w in ("--texts", t)), *(w for p in passes for w in ("--passes", p))]
    data = tmp_path / "q.json"
    files = ("--json", str(data), "--rounds", "3", "--lowering", "eager")
    assert run(monkeypatch, "quality", tiny_lm, *arguments, *files) == 0
    rows = json.loads(data.read_text())["rows"]
    kl = [row["quality"]["metrics"]["kl"] for row in rows]
    assert abs(kl[0]["value"]) < 1e-6 < kl[1]["low"]
    assert kl[1]["high"] < kl[2]["low"] <= kl[2]["value"] < kl[3]["value"]
    bits = [row["quality"]["metrics"]["bits_per_byte"]["value"] for row in rows]
    assert bits[0] < 3 < 8  # it has learned: noise costs eight bits a byte
    sizes = [row["weight_bytes"] for row in rows]
    assert sizes[0] > 3 * sizes[1]
    assert sizes[1] > 1.5 * sizes[2] > 1.5 * sizes[3]


def test_a_changed_checkpoint_is_one_error(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path(checkpoint, "model.safetensors")
    digest = hashlib.sha256(weights.read_bytes() + b"more").hexdigest()
    Path(checkpoint, "model.safetensors.sha256").write_text(f"{digest}  model.safetensors\n")
    assert run(monkeypatch, "quality", checkpoint, "--texts", "held_out.txt") == 2
    assert "restore the file" in " ".join(capsys.readouterr().err.split())
