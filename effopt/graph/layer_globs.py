"""Layers chosen by path: globs with `|` between them, such as `lm_head|*.mlp.*`."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase


def is_named(path: str, globs: str) -> bool:
    """Whether one of the globs matches the path; `*` also matches dots."""
    return any(fnmatchcase(path, glob.strip()) for glob in globs.split("|"))


def strangers(globs: str, paths: Collection[str]) -> list[tuple[str, str]]:
    """The globs that match none of `paths`, each with the path that is spelled most like it."""
    found = [glob.strip() for glob in globs.split("|") if glob.strip()]
    unmatched = [glob for glob in found if paths and not any(fnmatchcase(path, glob) for path in paths)]
    return [(glob, difflib.get_close_matches(glob, paths, n=1, cutoff=0.0)[0]) for glob in unmatched]
