"""Texts of files: what a path means, and how its bytes become tokens."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from effopt.errors import OptionError, QualityError
from effopt.testing.quality import Text


def read_texts(paths: Sequence[str], tokenizer: Any = None, first: int | None = None) -> tuple[Text, ...]:
    """The texts of files, in the order given, those of a folder or a glob by name.

    Args:
        paths: files, folders (all files below, hidden ones aside), or globs (`**` for any depth). A file
            that two of them name is read once; an empty one in a folder or a glob is passed over.
        tokenizer: of `transformers`; None for a token a byte.
        first: a token before the first byte, if there is no tokenizer.

    Raises:
        OptionError: a path that names no file, or an empty one.
        QualityError: a text that the tokenizer cannot read, or nothing to read at all.
    """
    files = list(_files(paths))
    if not files:
        raise QualityError(f"there is no text in {', '.join(map(repr, paths))}: every file there is empty")
    made = (
        _bytes(name, text, first) if tokenizer is None else _tokens(name, text, tokenizer)
        for name, text in files
    )
    return tuple(made)


def _files(paths: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content), every file once."""
    seen: set[Path] = set()
    for given in paths:
        is_one = Path(given).is_file()
        found = [Path(given)] if is_one else _below(given)
        if not found:
            raise OptionError(f"--texts {given!r} names no file")
        for path in found:
            text = path.read_bytes()
            if is_one and not text:
                raise OptionError(f"--texts {given!r} is empty: leave it out")
            if text and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path.as_posix(), text


def _below(given: str) -> list[Path]:
    if Path(given).is_dir():
        root = Path(given)
        every = [p for p in root.rglob("*") if not any(part[0] == "." for part in p.relative_to(root).parts)]
    else:
        every = [Path(p) for p in glob.glob(given, recursive=True)]
    return sorted(p for p in every if p.is_file())


def _bytes(name: str, text: bytes, first: int | None) -> Text:
    tokens = ([] if first is None else [first]) + list(text)
    return Text(name, torch.tensor(tokens, dtype=torch.int64))


def _tokens(name: str, content: bytes, tokenizer: Any) -> Text:
    """Tokens, and the bytes that each stands for: those between its end and the end of the one before.

    So no byte is counted twice where two tokens share a character, and what stands for nothing in the text,
    such as the token before its beginning, has none.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise QualityError(f"text {name!r} is not UTF-8 at byte {error.start}: leave it out") from error
    if not getattr(tokenizer, "is_fast", False):
        raise QualityError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text: give a function that"
            " returns (model, texts) with `token_bytes`"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, ends = list(found["input_ids"]), [end for _, end in found["offset_mapping"]]
    if ends:
        ends[-1] = len(text)
    sizes, before = [], 0
    for end in ends:
        sizes.append(len(text[before:end].encode()))
        before = max(before, end)
    if tokenizer.bos_token_id is not None:
        tokens, sizes = [tokenizer.bos_token_id, *tokens], [0, *sizes]
    return Text(name, torch.tensor(tokens, dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64))
