"""`effopt passes`: what passes there are, and the page of one."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from effopt.commands.terminal import output
from effopt.errors import unknown

if TYPE_CHECKING:
    from effopt.passes.base import Pass
    from effopt.plugins.manager import Registry

_BUILT_IN = "effopt"


def passes(
    name: Annotated[str, typer.Argument(help="Show the page of this pass.", show_default=False)] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/passes.md.")] = False,
) -> None:
    """List the passes, or show one."""
    from effopt.plugins.manager import build_registry

    registry = build_registry()
    if markdown:
        typer.echo(as_markdown(registry), nl=False)
    elif name:
        if name not in registry.passes:
            raise unknown("pass", name, registry.passes)
        _show_page(registry.passes[name], registry.origin[name])
    else:
        _show_list(registry)


def _show_list(registry: Registry) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("pass", "stage", "exact", "by default", "what it does"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "pass")
    for pass_ in sorted(registry.passes.values(), key=lambda p: p.stage):
        exact = Text("exact", style="green") if pass_.exact else Text("lossy", style="yellow")
        name = Text(pass_.name, style="bold")
        if registry.origin[pass_.name] != _BUILT_IN:
            name.append(f" ({registry.origin[pass_.name]})", style="dim")
        row = (pass_.stage.name.lower(), exact, "yes" if is_default(pass_) else "no")
        table.add_row(name, *row, Text(summary(pass_)))
    output().print(table, "\neffopt passes NAME: the page and the options of one", highlight=False)


def _show_page(pass_: type[Pass], origin: str) -> None:
    console = output()
    kind = "exact" if pass_.exact else "lossy"
    console.print(Text(pass_.name, style="bold"), end="  ")
    default = "on by default" if is_default(pass_) else "only when asked for"
    console.print(f"stage {pass_.stage.name.lower()}, {kind}, {default}, from {origin}", highlight=False)
    console.print(f"\n{documentation(pass_)}\n", highlight=False, markup=False)
    for field in dataclasses.fields(pass_):
        bounds = {k: v for k, v in field.metadata.items() if k != "doc"}
        limits = "".join(f", {k} {v}" for k, v in bounds.items())
        doc = field.metadata.get("doc", "")
        console.print(
            f"  {field.name}: {field.type} = {field.default}{limits}  {doc}", highlight=False, markup=False
        )
    for word in ("requires", "after", "conflicts"):
        if getattr(pass_, word):
            console.print(f"{word}: {', '.join(getattr(pass_, word))}", highlight=False)
    console.print(f"[dim]{inspect.getsourcefile(pass_)}[/dim]", highlight=False)


def is_default(pass_: type[Pass]) -> bool:
    """Whether the exact pipeline holds it."""
    return pass_.exact and pass_.default


def documentation(pass_: type[Pass]) -> str:
    """The page of a pass: the docstring of its file, or of its class where the file holds several."""
    module = inspect.getmodule(pass_)
    own = inspect.cleandoc(pass_.__doc__) if "__doc__" in vars(pass_) and pass_.__doc__ else ""
    text = inspect.getdoc(module) or own
    return text.strip()


def summary(pass_: type[Pass]) -> str:
    """The first sentence of its page, on one line."""
    paragraph = documentation(pass_).split("\n\n")[0].replace("\n", " ")
    return paragraph.split(". ")[0].rstrip(".:")


def as_markdown(registry: Registry) -> str:
    """docs/passes.md: a table of the built-in passes, then the page of each."""
    own = [p for name, p in registry.passes.items() if registry.origin[name] == _BUILT_IN]
    rows = [
        f"| [`{p.name}`](#{p.name}) | {p.stage.name.lower()} | {'exact' if p.exact else 'lossy'} |"
        f" {'yes' if is_default(p) else 'no'} | {_cell(summary(p))} |"
        for p in sorted(own, key=lambda p: p.stage)
    ]
    head = [
        "# Passes",
        "",
        "Written by `effopt passes --markdown` from the docstrings of the passes. An exact pass computes the",
        "same function up to floating-point reassociation; a lossy one runs only when it is named.",
        "",
        "| pass | stage | | default | what it does |",
        "|---|---|---|---|---|",
    ]
    pages = [line for p in sorted(own, key=lambda p: p.stage) for line in _page(p)]
    return "\n".join([*head, *rows, *pages]) + "\n"


def _page(pass_: type[Pass]) -> list[str]:
    lines = ["", f"## {pass_.name}", "", "```text", *documentation(pass_).splitlines(), "```"]
    fields = dataclasses.fields(pass_)
    if fields:
        lines += ["", "| option | default | |", "|---|---|---|"]
        lines += [f"| `{f.name}` | `{f.default}` | {_cell(f.metadata.get('doc', ''))} |" for f in fields]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
