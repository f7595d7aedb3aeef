"""Puts what a program wrote into its section of a page: between a mark that names the program, and an end."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end -->"


def fill(page: Path, start: str, text: str, end: str = END) -> None:
    """Replace the lines between `start` and the `end` after it by `text`. Raises SystemExit without them."""
    before, begun, rest = page.read_text("utf-8").partition(f"{start}\n")
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise SystemExit(f"{page} has no section between {start} and {end}")
    page.write_text(f"{before}{begun}{text}\n{ended}{after}", encoding="utf-8")
