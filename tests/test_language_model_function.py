"""MODEL as a function that gives a model, its texts and its probes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from effopt.commands.language_model import load_language_model
from effopt.errors import OptionError, QualityError
from effopt.testing.quality import Probe, Text

FUNCTIONS = """
from types import SimpleNamespace
import torch
from effopt.testing.quality import Probe, Text
import sibling_of_language_model

class Model(torch.nn.Embedding):
    config = SimpleNamespace(vocab_size=5)

def text(n=9, name="t"):
    return Text(name, torch.arange(n) % 5)

def pair(): return Model(5, 5), [text()]
def triple(): return Model(5, 5), [text()], [Probe(torch.arange(4), (2, 3), 2)]
def no_texts(): return Model(5, 5), []
def short(): return Model(5, 5), [text(1)]
def dtype(): return Model(5, 5), [Text("t", torch.arange(4.0))]
def probe(): return Model(5, 5), [text()], [Probe(torch.tensor([0, -3]), (1, 2), 1)]
def wrong(): return 3
def bytes_(): return Model(5, 5), [b"text"]
def raises(): return 1 / 0
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "functions_of_language_model.py").write_text(FUNCTIONS)
    (tmp_path / "sibling_of_language_model.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return "functions_of_language_model"


def test_a_function_gives_model_texts_and_probes(functions: str, tmp_path: Path) -> None:
    for place in (functions, f"{tmp_path}/{functions}.py", f"{functions}.py"):
        found = load_language_model(f"{place}:pair")
        assert isinstance(found.model, nn.Module)
        assert not found.model.training
        assert [type(t) for t in found.texts] == [Text]
        assert found.context is None
        assert [type(p) for p in load_language_model(f"{place}:triple").probes] == [Probe]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("pear", "Did you mean 'pair'?"),
        ("wrong", r"must return \(model, texts\) or \(model, texts, probes\).*; got int"),
        ("bytes_", r"got \(Model, list\)"),
        ("raises", r"raised ZeroDivisionError: division by zero \(.*functions_of_language_model\.py:\d+\)"),
        ("no_texts", "has no texts to be judged by"),
        ("short", "text 't' has 1 tokens: two are the least"),
        ("dtype", r"text 't': expected int64 \[n\], got torch.float32 \[4\]"),
        ("probe", "probe 0 has token -3, and the vocabulary of .* ends at 4"),
    ],
)
def test_a_function_that_gives_something_else_is_refused(functions: str, function: str, words: str) -> None:
    with pytest.raises((OptionError, QualityError), match=words):
        load_language_model(f"{functions}.py:{function}")


def test_texts_are_for_folders(functions: str) -> None:
    with pytest.raises(OptionError, match="gives texts of its own"):
        load_language_model(f"{functions}:pair", ["more.txt"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_file.py:f", r"there is no file 'no_such_file\.py'"),
        ("no.such.module:f", r"cannot import 'no\.such\.module'"),
    ],
)
def test_a_place_that_is_not_there_is_refused(name: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        load_language_model(name)


def test_a_probe_beyond_the_context_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long_probe.py").write_text(
        "import torch\n"
        "from effopt.testing.quality import Probe, Text\n"
        "from types import SimpleNamespace\n"
        "def f():\n"
        "    model = torch.nn.Embedding(5, 5)\n"
        "    model.config = SimpleNamespace(max_position_embeddings=8)\n"
        "    return model, [Text('t', torch.arange(4))], [Probe(torch.zeros(9).long(), (1, 2), 1)]\n"
    )
    with pytest.raises(QualityError, match=r"a probe has 9 tokens, more than the context of .*, 8"):
        load_language_model(f"{tmp_path}/long_probe.py:f")
