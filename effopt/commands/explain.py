"""`effopt explain`: what effopt does to a model, and does not, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from effopt.commands.model import (
    Attention,
    Batch,
    Disable,
    Example,
    Heads,
    Hidden,
    Html,
    JsonFile,
    Layers,
    Lowering,
    Model,
    Passes,
    Size,
    Tokens,
    Train,
    load,
)
from effopt.commands.output_file import check_output
from effopt.commands.terminal import errors, output, progress
from effopt.errors import UnexpectedOps
from effopt.plugins.expect import expect as check_expected
from effopt.plugins.expect import manifest_of

if TYPE_CHECKING:
    from effopt.plugins.report import Report


def explain(
    model: Model,
    passes: Passes = "",
    disable: Disable = "",
    html: Html = "",
    json_file: JsonFile = "",
    expect: Annotated[str, typer.Option(help="Compare the ops with this manifest.", show_default=False)] = "",
    write_expect: Annotated[str, typer.Option(help="Write the manifest.", show_default=False)] = "",
    lowering: Lowering = "auto",
    train: Train = False,
    layers: Layers = 4,
    hidden: Hidden = 512,
    heads: Heads = 8,
    batch: Batch = 1,
    tokens: Tokens = 128,
    attention: Attention = "eager",
) -> None:
    """Report what was rewritten in MODEL, and what was left alone and why.

    Exit code 1 if --expect names a manifest that the model does not meet.
    """
    for path in (html, json_file, write_expect):
        check_output(path)
    example = load(model, Size(layers, hidden, heads, batch, tokens, attention))
    report = report_of(example, {"passes": passes, "disable": disable, "lowering": lowering}, train)
    output().print(report)
    for path in (html, json_file):
        if path:
            report.write(path)
    if write_expect:
        text = json.dumps(manifest_of(report), indent=1)
        Path(write_expect).write_text(text + "\n", encoding="utf-8")
    if expect and not _meets(report, expect):
        raise typer.Exit(1)


def report_of(example: Example, options: Mapping[str, Any], train: bool) -> Report:
    """Compile and call once, saying so."""
    import torch

    from effopt.compile import explain as explain_model

    with progress("compiling"), torch.set_grad_enabled(train):
        return explain_model(example.model, *example.args, options=options, **example.kwargs)


def _meets(report: Report, manifest: str) -> bool:
    try:
        check_expected(report, manifest)
    except UnexpectedOps as unmet:
        errors().print(Text(f"{manifest} is not met:\n{unmet}", style="red"))
        return False
    output().print(Text(f"{manifest} is met", style="green"))
    return True
