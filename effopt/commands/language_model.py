"""What a MODEL argument means where quality is judged: a trained language model, held-out texts, probes.

A folder holds a `transformers` checkpoint; nothing is fetched. If a file of weights has its sha256 beside it
(`sha256sum model.safetensors > model.safetensors.sha256`), it is checked first. A function of one's own
returns the model with its texts.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effopt.commands.own_function import made_by, told
from effopt.errors import EffoptError, OptionError, QualityError, unknown

if TYPE_CHECKING:
    from torch import dtype as DType
    from torch import nn

    from effopt.quality.texts import Probe, Text

LANGUAGE_MODEL_HELP = (
    "A folder with a transformers checkpoint (config.json, model.safetensors), or package.module:function or"
    " file.py:function that returns (model, texts) or (model, texts, probes)."
)
LanguageModelName = Annotated[
    str, typer.Argument(help=LANGUAGE_MODEL_HELP, metavar="MODEL", show_default=False)
]
TextPaths = Annotated[
    list[str] | None,
    typer.Option("--texts", help="Held-out text for a folder: a file, folder or glob. May be repeated."),
]
DTypeName = Annotated[str, typer.Option("--dtype", help="Of a folder's weights: float32, bfloat16, float16.")]

_DTYPES = ("float32", "bfloat16", "float16")
_MOST_BYTE_TOKENS = 512  # 256 and some for marks, ByT5's 128 among them


@dataclass(frozen=True)
class LanguageModel:
    """A trained model, and what it is judged by."""

    name: str
    model: nn.Module
    """In evaluation mode; token ids, int64 [rows, t] -> logits, or an object that has them."""
    texts: tuple[Text, ...]
    probes: tuple[Probe, ...] = ()

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for; None if it has no configuration that says so."""
        found = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None


def load_language_model(model: str, texts: Sequence[str] = (), dtype: str = "float32") -> LanguageModel:
    """The model that a MODEL argument names, and the texts to judge it by.

    Args:
        model: a folder, or `module:function` or `file.py:function`.
        texts: for a folder: files, folders or globs. Bytes are tokens if the folder holds no tokenizer,
            after the configuration's `bos_token_id` if there is one.
        dtype: of a folder's weights once loaded.

    Raises:
        OptionError: nothing of that name, files missing, a function that returns something else.
        QualityError: a checkpoint whose sha256 is not the one beside it, weights that are missing in it, no
            texts, texts or probes that are too short or that do not fit the model.
        EffoptError: transformers is needed and not installed.
    """
    if Path(model).is_dir():
        found = _from_folder(Path(model), texts, dtype)
    elif ":" in model:
        if texts:
            raise OptionError(f"--texts is for checkpoints in a folder: {model} gives texts of its own")
        found = _from_function(model)
    else:
        raise OptionError(
            f"MODEL {model!r} is neither a folder nor a function: give the folder of a transformers"
            " checkpoint, or package.module:function or file.py:function that returns (model, texts) or"
            " (model, texts, probes)"
        )
    return _checked(found)


def _from_function(name: str) -> LanguageModel:
    from torch import nn

    from effopt.quality.texts import Probe, Text

    made = made_by(name)
    is_right = isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)
    for part, kind in zip(made[1:] if is_right else (), (Text, Probe), strict=False):
        is_right &= isinstance(part, Sequence) and all(isinstance(member, kind) for member in part)
    if not is_right:
        raise OptionError(
            f"{name} must return (model, texts) or (model, texts, probes): an nn.Module, Text and Probe of"
            f" effopt.testing.quality; got {told(made)}"
        )
    model, texts, *probes = made
    return LanguageModel(name, model.eval(), tuple(texts), tuple(probes[0]) if probes else ())


def _from_folder(folder: Path, texts: Sequence[str], dtype: str) -> LanguageModel:
    if importlib.util.find_spec("transformers") is None:
        raise EffoptError("a checkpoint in a folder needs transformers: pip install 'effopt[hf]'")
    import torch

    from effopt.commands.texts import read_texts

    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, _DTYPES)
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        lacks = "config.json" if weights else "weights (model.safetensors)"
        raise OptionError(f"{folder} is no transformers checkpoint: it has no {lacks}")
    if not texts:
        raise OptionError(f"there is no text to judge {folder} by: give held-out text, --texts PATH")
    for path in weights:
        _check_sha256(path)
    model = _read_weights(folder, getattr(torch, dtype))
    tokenizer = _tokenizer(folder, _vocabulary(model))
    first = model.config.bos_token_id if tokenizer is None else None
    return LanguageModel(str(folder), model, read_texts(texts, tokenizer, first))


def _check_sha256(path: Path) -> None:
    """Raise QualityError if the sha256 written beside a file, as sha256sum writes it, is another."""
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.is_file():
        return
    expected, *_ = [*beside.read_text(encoding="utf-8").split(), ""]
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if expected != got:
        raise QualityError(
            f"{path} has sha256 {got}, but {beside.name} says {expected or 'nothing'}: restore the file (is"
            " it a partial download?), or write the hash of the new weights: sha256sum"
            f" {path.name} > {beside.name}"
        )


def _read_weights(folder: Path, dtype: DType) -> Any:
    import transformers

    shows_bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise _unreadable(folder, error) from error
    finally:
        if shows_bar:
            transformers.utils.logging.enable_progress_bar()
    wrong = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if wrong:
        raise QualityError(
            f"{folder} lacks {len(wrong)} weights of its model, which would be random, such as {wrong[0]}: is"
            " config.json that of these weights?"
        )
    return model.eval()


def _tokenizer(folder: Path, vocabulary: int | None) -> Any:
    """The folder's tokenizer; None if it holds none, which only a model of bytes can do without."""
    import transformers

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        if vocabulary is not None and vocabulary > _MOST_BYTE_TOKENS:
            raise OptionError(
                f"{folder} has no tokenizer, and its model reads more than bytes ({vocabulary} tokens): save"
                " the tokenizer there too, tokenizer.save_pretrained(folder)"
            )
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> OptionError:
    said = str(error).strip().split("\n")[0]
    return OptionError(f"transformers cannot read {folder} ({type(error).__name__}: {said})")


def _checked(found: LanguageModel) -> LanguageModel:
    """The same. Raises QualityError if there is nothing to judge by, or something the model cannot read."""
    import torch

    if not found.texts:
        raise QualityError(f"{found.name} has no texts to be judged by")
    vocabulary = _vocabulary(found.model)
    named = [(f"text {text.name!r}", text.tokens) for text in found.texts]
    named += [(f"probe {i}", probe.tokens) for i, probe in enumerate(found.probes)]
    for what, tokens in named:
        if tokens.dtype != torch.int64 or tokens.dim() != 1:
            raise QualityError(f"{what}: expected int64 [n], got {tokens.dtype} {list(tokens.shape)}")
        if len(tokens) < 2:
            raise QualityError(
                f"{what} has {len(tokens)} tokens: two are the least to predict one; leave it out"
            )
        if vocabulary is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            worst = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise QualityError(
                f"{what} has token {worst}, and the vocabulary of {found.name} ends at {vocabulary - 1}: is"
                " this the tokenizer that it was trained with? (a folder without one is read byte by byte)"
            )
    longest = max((len(probe.tokens) for probe in found.probes), default=0)
    if found.context is not None and longest > found.context:
        raise QualityError(
            f"a probe has {longest} tokens, more than the context of {found.name}, {found.context}: give"
            " shorter ones"
        )
    return found


def _vocabulary(model: Any) -> int | None:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(table, "num_embeddings", None)
    return size if isinstance(size, int) else getattr(getattr(model, "config", None), "vocab_size", None)
