"""Writes the graph before and after each pass that changed it, as text, to a directory."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from effopt.graph.printing import listing
from effopt.passes.base import Pass
from effopt.plugins.hookspec import hookimpl


class Dump:
    """The plugin, one object for each compile call.

    Files: `<directory>/graph<N>/<nn>-<pass>.before.txt` and `.after.txt`.
    """

    def __init__(self, directory: str) -> None:
        self._root = Path(directory)
        self._folder: Path | None = None
        self._count = 0

    @hookimpl
    def effopt_compile_start(self, module: GraphModule) -> None:
        """Make a folder of its own for this graph, and write the captured graph to it."""
        self._folder = _fresh(self._root)
        (self._folder / "00-captured.txt").write_text(listing(module), encoding="utf-8")

    @hookimpl(wrapper=True)
    def effopt_run_pass(self, pass_: Pass, module: GraphModule) -> Generator[None, Any, Any]:
        """Write both listings if they differ."""
        before = listing(module)
        result = yield
        self._count += 1
        after = listing(module)
        if self._folder is not None and before != after:
            stem = f"{self._count:02d}-{pass_.name}"
            (self._folder / f"{stem}.before.txt").write_text(before, encoding="utf-8")
            (self._folder / f"{stem}.after.txt").write_text(after, encoding="utf-8")
        return result


def _fresh(root: Path) -> Path:
    for index in itertools.count():
        folder = root / f"graph{index}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("itertools.count does not end")
