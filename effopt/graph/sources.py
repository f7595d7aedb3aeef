"""Identity of code, for caches: what an edit of effopt makes another one."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def digest_of_effopt() -> str:
    """Of all source files of this package."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"|".join(f.read_bytes() for f in files)).hexdigest()
