"""A file that a command is to write, looked at before the work whose result goes there."""

from __future__ import annotations

import os
from pathlib import Path

from effopt.errors import OptionError


def check_output(path: str, kind: str = "") -> None:
    """Raise OptionError for a path that could not be written, or does not end in `kind`; "" is no path."""
    if not path:
        return
    where = Path(path)
    if kind and where.suffix != kind:
        raise OptionError(f"{path!r}: expected a path that ends in {kind}")
    if where.is_dir() or not where.parent.is_dir():
        why = "is a folder" if where.is_dir() else f"there is no folder {str(where.parent)!r}"
        raise OptionError(f"cannot write {path!r}: {why}")
    if not os.access(where if where.exists() else where.parent, os.W_OK):
        raise OptionError(f"cannot write {path!r}: permission denied")
