"""The rules of the house, checked by program: layers, sizes, names. CONTRIBUTING.md gives them in words."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "effopt").rglob("*.py"))
EVERYTHING = [
    f for d in ("effopt", "tests", "examples", "benchmarks") for f in sorted((ROOT / d).rglob("*.py"))
]
FAMILIES = ("canonicalize", "cleanup", "attention", "fusion", "quantization", "layers", "kv")

LAYER = {
    "errors": 0,
    "options": 1,
    "target": 1,
    "quality": 1,
    "graph": 2,
    "passes": 3,
    "backends": 3,
    "plugins": 4,
    "pipeline": 5,
    "model_graphs": 5,
    "compilation": 5,
    "compile": 6,
    "": 7,  # effopt/__init__.py, which only re-exports
    "bench": 7,
    "calibration": 6,
    "tuning": 6,
    "cache_edits": 5,
    "prepacking": 5,
    "split_layers": 3,
    "cache_layers": 4,
    "cache_layout": 5,
    "caches": 6,
    "decoding": 3,
    "tradeoff": 8,
    "testing": 8,
    "commands": 9,
    "cli": 10,
}
"""An import goes to a lower number, or stays in its own part: so passes and backends never meet."""

PASS_LINES, FILE_LINES, FUNCTION_LINES = 150, 500, 40
LONG_FUNCTIONS: dict[str, str] = {}
"""`path:function` -> why it reads better in one piece. An entry that is no longer needed fails."""

BANNED_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "handler", "processor", "manager"}
MANAGER = "effopt/plugins/manager.py"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all imports, those in functions and under TYPE_CHECKING included."""
    package = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*up, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def part(dotted: str) -> str:
    """The part of the house that a dotted name is in; "" for a name that effopt/__init__.py exports."""
    first = [*dotted.split("."), ""][1]
    there = (ROOT / "effopt" / first).is_dir() or (ROOT / "effopt" / f"{first}.py").is_file()
    return first if there or first in LAYER else ""


def family(dotted: str) -> str | None:
    words = dotted.split(".")
    return words[2] if words[:2] == ["effopt", "passes"] and len(words) > 2 and words[2] in FAMILIES else None


def source_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, text: list[str]) -> int:
    """Lines of the body that hold code: no docstring, no comment, no blank."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    lines = text[body[0].lineno - 1 : function.end_lineno]
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    here = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert part(here) in LAYER, (
        f"{part(here)!r} has no place in the layers: add it to LAYER and to the design"
    )
    wrong = []
    for line, name in imports(path):
        at = f"{name_of(path)}:{line}: {name}"
        if name.split(".")[0] == "triton" and not here.startswith("effopt.backends.triton"):
            wrong.append(f"{at}: Triton stays in backends/triton")
        if name.split(".")[0] != "effopt":
            continue
        if part(name) != part(here) and LAYER.get(part(name), 99) >= LAYER[part(here)]:
            wrong.append(f"{at}: does not point down from {part(here) or 'effopt/__init__.py'}")
        if family(here) and family(name) and family(here) != family(name):
            wrong.append(f"{at}: a family imports another")
        if family(name) == "canonicalize" != family(here) and part(here) != "plugins":
            wrong.append(f"{at}: canonicalize is imported only by the plugin that lists the built-in passes")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [f for f in FILES if "plugins" not in f.parts], ids=name_of)
def test_environment_is_read_by_plugins_only(path: Path) -> None:
    text = [ast.unparse(n) for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)]
    text += [name for _, name in imports(path)]
    assert not {"os.environ", "os.getenv", "os.putenv"} & set(text), "make it an option of a plugin"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text().splitlines()
    is_pass = family(".".join(path.relative_to(ROOT).parts)) and path.name != "__init__.py"
    # A pass stays below its limit, so that it is read on two screens; other files may reach theirs.
    limit = PASS_LINES - 1 if is_pass else FILE_LINES
    assert len(text) <= limit, f"{len(text)} lines; at most {limit}"
    if "backends/triton" in name_of(path):
        return
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f"{name_of(path)}:{f.name}" for f in functions if source_lines(f, text) > FUNCTION_LINES}
    allowed = {key for key in LONG_FUNCTIONS if key.startswith(name_of(path) + ":")}
    assert long == allowed, (
        f"above {FUNCTION_LINES} lines: {long - allowed}; allowed for nothing: {allowed - long}"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_pass_is_listed(name: str) -> None:
    base = importlib.import_module("effopt.passes.base")
    folder = ROOT / "effopt" / "passes" / name
    package = importlib.import_module(f"effopt.passes.{name}")
    assert package.__doc__, "the family's __init__ says what the family is"
    listed = {p if isinstance(p, type) else type(p) for p in package.PASSES}
    for path in sorted(folder.glob("[!_]*.py")):
        module = importlib.import_module(f"effopt.passes.{name}.{path.stem}")
        classes = [
            c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
        ]
        found = {c for c in classes if issubclass(c, base.Pass) and c.__name__[0] != "_"}
        assert found, f"{name_of(path)} holds no pass; what passes share belongs in graph/"
        assert found <= listed, f"not in PASSES: {', '.join(c.__name__ for c in found - listed)}"


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_names_and_notes(path: Path) -> None:
    named = {path.stem, path.parent.name} & BANNED_NAMES
    assert not named or name_of(path) == MANAGER, f"{named} says nothing: name the file by its subject"
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            note = re.search(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(\S)", token.string)
            assert not note, (
                f"line {token.start[0]}: a note names the event that retires it: TODO(event): ..."
            )
