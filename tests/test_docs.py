"""Documents that run: every Python block and every `$ effopt` command of README.md and docs/.

A document is one program: its blocks share a namespace, in order, and its commands run after them in the
same folder, so that they can read what the blocks wrote. A block that cannot run is fenced `python no-run`
and opens with the comment `# no-run: <reason>`. A command that needs a GPU says `(needs GPU)` on its line.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from effopt.plugins.manager import build_registry

ROOT = Path(__file__).parent.parent
DOCUMENTS = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.is_file()]
TIMEOUT_S = 900
COMMAND = "import sys; sys.argv[0] = 'effopt'; from effopt.cli import main; sys.exit(main())"
FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)$")


@dataclass(frozen=True)
class Block:
    line: int
    """Of the opening fence, from 1."""
    info: str
    lines: tuple[str, ...]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, without the indentation of their fence."""
    found, open_at, body = [], None, []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if open_at is None:
            if fence:
                open_at, body = (number, fence), []
        elif fence and not fence["info"].strip() and len(fence["ticks"]) >= len(open_at[1]["ticks"]):
            found.append(Block(open_at[0], open_at[1]["info"].strip(), tuple(body)))
            open_at = None
        else:
            body.append(line.removeprefix(open_at[1]["indent"]))
    assert open_at is None, f"line {open_at[0]}: a fence that nothing closes"
    return found


def program(found: list[Block]) -> str:
    """The Python blocks as one file, each line where the document has it, so that a traceback names it."""
    lines: list[str] = []
    for block in found:
        if block.info == "python":
            lines += [""] * (block.line - len(lines)) + list(block.lines)
        elif block.info.startswith("python"):
            assert block.info == "python no-run", f"line {block.line}: unknown fence {block.info!r}"
            assert re.match(r"# no-run: \S", "".join(block.lines[:1])), (
                f"line {block.line}: say why it is not run"
            )
    return "\n".join(lines) + "\n" if lines else ""


def commands(found: list[Block]) -> list[tuple[str, ...]]:
    """Arguments of the `$ effopt ...` lines of console blocks, but for those that need a GPU."""
    text = "\n".join(line for block in found if block.info == "console" for line in block.lines)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("$ effopt")]
    return [tuple(shlex.split(line, comments=True)[2:]) for line in lines if "(needs GPU)" not in line]


def assert_runs(arguments: list[str], where: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=where,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_document_runs(document: Path, tmp_path: Path) -> None:
    found = blocks(document.read_text())
    source = program(found)
    if source:
        # A file, not `exec`: torch.compile and Triton read the source of the functions they are given.
        script = tmp_path / f"{document.stem.replace('-', '_')}_md.py"
        script.write_text(source)
        assert_runs([str(script)], tmp_path)
    for arguments in commands(found):
        assert_runs(["-c", COMMAND, *arguments], tmp_path)


SAMPLE = """Text
```python
a = 1
```
1. In a list:
   ```python
   assert a == 1
   ```
```console
$ effopt explain \\
    --expect "a b.json"   # a comment
$ effopt bench   (needs GPU)
$ make test
```
"""


def test_lines_of_the_program_are_lines_of_the_document() -> None:
    source = program(blocks(SAMPLE))
    assert source.splitlines()[2] == "a = 1"
    assert source.splitlines()[6] == "assert a == 1"


def test_commands_are_found_and_those_for_a_gpu_are_left_out() -> None:
    assert commands(blocks(SAMPLE)) == [("explain", "--expect", "a b.json")]


def test_a_block_that_is_not_run_says_why() -> None:
    with pytest.raises(AssertionError, match="say why"):
        program(blocks("```python no-run\nimport this\n```\n"))
    assert program(blocks("```python no-run\n# no-run: downloads 8 GB\n```\n")) == ""


def test_the_readme_names_every_pass() -> None:
    registry = build_registry()
    own = [name for name, origin in registry.origin.items() if origin == "effopt"]
    assert own
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in own if f"`{name}`" not in text] == []
