"""What was measured of lowerings, kept in the process and in Inductor's cache folder.

One small file a question, written whole and then linked to its name: a reader never sees half of one, and of
several writers the first decides for all, so that the ranks of one job take the same kernels (the last one
decides on a file system without links). A file that cannot be read, that answers another question, or not all
of it, is ignored and written anew. Who may read it is for the user's umask to say, as in all of the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
_known: dict[str, dict[str, float]] = {}
"""Question -> seconds by lowering, of this process."""


def folder() -> Path | None:
    """Inductor's own folder, which TORCHINDUCTOR_CACHE_DIR moves, and in it ours; None if caches are off."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if config.force_disable_caches else Path(cache_dir()) / "effopt" / "lowerings"


def recall(question: Mapping[str, Any]) -> dict[str, float] | None:
    """Seconds by lowering, as they were measured first; None if they never were.

    Args:
        question: plain values; `lowerings` holds the names that are asked about.
    """
    text = json.dumps(question, sort_keys=True)
    if text not in _known:
        home = folder()
        found = None if home is None else _read(home / _name(text), text)
        if found is None:
            return None
        _known[text] = found
    return _known[text]


def keep(question: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, float]:
    """Keep an answer, and give the one that counts: another process may have been the first.

    Raises:
        OSError: the folder cannot be written. The process knows the answer all the same.
    """
    text = json.dumps(question, sort_keys=True)
    _known[text] = dict(seconds)
    home = folder()
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
        _known[text] = _write(home / _name(text), text, _known[text])
    return _known[text]


def forget() -> None:
    """Forget what this process knows; files stay."""
    _known.clear()


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32] + ".json"


def _read(path: Path, text: str) -> dict[str, float] | None:
    """The answer in a file, if it is one, and to this question."""
    try:
        entry = json.loads(path.read_text("utf-8"))
        if entry["format"] != FORMAT or entry["question"] != text:
            return None
        found = {name: float(seconds) for name, seconds in entry["seconds"].items()}
        asked = json.loads(text)["lowerings"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    whole = found.keys() == set(asked) and all(math.isfinite(t) and t > 0 for t in found.values())
    return found if whole else None


def _write(path: Path, text: str, seconds: dict[str, float]) -> dict[str, float]:
    """Put an answer in its place unless a good one is there; the one that is there then."""
    made = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        with made.open("x", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "question": text, "seconds": seconds}, file)
        try:
            os.link(made, path)
        except OSError:  # there is one, or the file system has no links
            there = _read(path, text)
            if there is not None:
                return there
            os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)
    return seconds
