"""What a MODEL argument means where quality is judged: checkpoints, texts, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from effopt.commands.language_model import LanguageModel, load_language_model
from effopt.commands.texts import read_texts
from effopt.errors import OptionError, QualityError

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "tiny_lm" / "checkpoint"
PROSE = "One café, two cafés; 日本語 and 👩‍🚀 too.\n\n    def indented(): ...\n"


def save(folder: Path, **changes: Any) -> Any:
    """A small random Llama in a folder."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": 256,
        "tie_word_embeddings": False,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def prose(tmp_path: Path) -> str:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return str(path)


def test_a_folder_without_a_tokenizer_is_read_byte_by_byte(folder: Path, prose: str) -> None:
    found = load_language_model(str(folder), [prose])
    assert isinstance(found, LanguageModel)
    assert found.name == str(folder)
    assert not found.model.training
    assert found.context == 64
    assert found.probes == ()
    (text,) = found.texts
    assert text.name == Path(prose).as_posix()
    assert text.tokens.tolist() == [256, *PROSE.encode()]
    assert text.token_bytes is None


def test_weights_are_those_of_the_folder_in_the_dtype_asked_for(folder: Path, prose: str) -> None:
    saved = save(folder)
    for dtype in ("float32", "bfloat16"):
        model = load_language_model(str(folder), [prose], dtype).model
        for name, value in model.state_dict().items():
            expected = saved.state_dict()[name].to(getattr(torch, dtype))
            assert torch.equal(value, expected), name


def test_the_tiny_model_by_its_folder_and_by_its_function() -> None:
    ours = load_language_model(str(CHECKPOINT), [str(CHECKPOINT.parent / "data.py")])
    made = load_language_model(f"{ROOT}/examples/tiny_lm/evaluate.py:language_model")
    assert ours.context == made.context == 1024
    assert int(ours.texts[0].tokens[0]) == int(made.texts[0].tokens[0]) == 256
    assert {probe.distance for probe in made.probes} == {256, 512, 1024}
    for name, value in made.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name


def test_both_hashes_of_the_tiny_model_agree() -> None:
    numbers = json.loads((CHECKPOINT / "numbers.json").read_text())
    beside = (CHECKPOINT / "model.safetensors.sha256").read_text()
    assert beside == f"{numbers['sha256']}  model.safetensors\n"


def test_a_changed_checkpoint_is_refused(folder: Path, prose: str) -> None:
    weights, beside = folder / "model.safetensors", folder / "model.safetensors.sha256"
    beside.write_text("0" * 64 + "  model.safetensors\n")
    with pytest.raises(QualityError, match=r"has sha256 [0-9a-f]{64}, but .* says 0{64}: restore the file"):
        load_language_model(str(folder), [prose])
    beside.write_text("")
    with pytest.raises(QualityError, match="says nothing"):
        load_language_model(str(folder), [prose])
    beside.write_text(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert load_language_model(str(folder), [prose]).texts


def test_tokens_of_a_tokenizer_stand_for_every_byte_once(tmp_path: Path, prose: str) -> None:
    folder = tmp_path / "checkpoint"
    write_tokenizer(folder)
    save(folder)
    (text,) = load_language_model(str(folder), [prose]).texts
    assert text.token_bytes is not None
    assert int(text.token_bytes.sum()) == len(PROSE.encode())
    assert (text.token_bytes >= 0).all()
    assert int(text.tokens[0]) == 0  # <s>, which stands for nothing
    assert int(text.token_bytes[0]) == 0
    assert (text.token_bytes[1:] == 0).any()  # tokens that share a character
    assert len(text.tokens) < len(PROSE.encode())


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE, 290 tokens, learned from ASCII alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def indented one two and too"] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.save_pretrained(folder)


def test_what_a_tokenizer_drops_at_the_end_is_counted(prose: str) -> None:
    class Words:
        is_fast, bos_token_id = True, None

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"input_ids": [5, 6], "offset_mapping": [(0, 3), (4, 8)]}

    (text,) = read_texts([prose], Words())
    assert text.token_bytes is not None
    assert text.token_bytes.tolist() == [3, len(PROSE.encode()) - 3]


def test_paths_are_files_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "in/b.txt", "in/deep/c.py", "in/.git/hidden", "in/.hidden"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("in/empty.txt").write_text("")
    names = [text.name for text in read_texts(["in", "a.txt", "in/b.txt"])]
    assert names == ["in/b.txt", "in/deep/c.py", "a.txt"]
    assert [text.name for text in read_texts(["in/**/*.py", "*.txt"])] == ["in/deep/c.py", "a.txt"]
    (text,) = read_texts(["a.txt"])
    assert bytes(text.tokens.tolist()) == b"a.txt"
    with pytest.raises(OptionError, match=r"'in/empty\.txt' is empty: leave it out"):
        read_texts(["in/empty.txt"])
    with pytest.raises(OptionError, match="'nothing/here' names no file"):
        read_texts(["a.txt", "nothing/here"])
    with pytest.raises(QualityError, match="every file there is empty"):
        read_texts(["in/empty.*"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bos_token_id": 299, "vocab_size": 299}, r"has token 299, and the vocabulary of .* ends at 298"),
        ({"vocab_size": 100, "bos_token_id": 1}, r"has token \d+, and the vocabulary of .* ends at 99"),
        ({"vocab_size": 1000}, r"has no tokenizer, and its model reads more than bytes \(1000 tokens\)"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(
    tmp_path: Path, prose: str, changes: dict[str, Any], words: str
) -> None:
    save(tmp_path / "c", **changes)
    with pytest.raises((OptionError, QualityError), match=words):
        load_language_model(str(tmp_path / "c"), [prose])


def test_a_folder_that_is_no_checkpoint_is_refused(folder: Path, tmp_path: Path, prose: str) -> None:
    with pytest.raises(OptionError, match=r"no text to judge .* by: give held-out text, --texts"):
        load_language_model(str(folder))
    with pytest.raises(OptionError, match=r"Valid: bfloat16, float16, float32"):
        load_language_model(str(folder), [prose], "int4")
    with pytest.raises(OptionError, match="is neither a folder nor a function"):
        load_language_model("llama", [prose])
    (folder / "config.json").write_text("{")
    with pytest.raises(OptionError, match="transformers cannot read"):
        load_language_model(str(folder), [prose])
    (folder / "config.json").unlink()
    with pytest.raises(OptionError, match=r"it has no config\.json"):
        load_language_model(str(folder), [prose])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match=r"it has no weights \(model\.safetensors\)"):
        load_language_model(str(tmp_path / "empty"), [prose])


def test_weights_that_are_missing_are_not_made_up(folder: Path, prose: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(QualityError, match=r"lacks 9 weights of its model, which would be random"):
        load_language_model(str(folder), [prose])


def test_a_text_that_is_too_short_or_not_utf_8_is_refused(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x")
    save(folder, bos_token_id=None)
    with pytest.raises(QualityError, match=r"short\.txt' has 1 tokens: two are the least"):
        load_language_model(str(folder), [str(short)])
    short.write_bytes(b"ab\xff")
    assert load_language_model(str(folder), [str(short)]).texts
    write_tokenizer(folder)
    with pytest.raises(QualityError, match=r"short\.txt' is not UTF-8 at byte 2: leave it out"):
        load_language_model(str(folder), [str(short)])
