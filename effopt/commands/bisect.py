"""`effopt bisect`: which rewrite makes a model wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.text import Text

from effopt.commands.model import (
    Attention,
    Batch,
    Disable,
    Example,
    Heads,
    Hidden,
    Layers,
    Lowering,
    Model,
    Passes,
    Size,
    Tokens,
    load,
)
from effopt.commands.output_file import check_output
from effopt.commands.terminal import errors, output, progress
from effopt.errors import CheckFailed


def bisect(
    model: Model,
    passes: Passes = "",
    disable: Disable = "",
    rtol: Annotated[
        float, typer.Option(min=0, help="What counts as wrong; 0 for ten times the dtype's.")
    ] = 0.0,
    repro: Annotated[str, typer.Option(help="Where the program that shows it goes.")] = "effopt_repro.py",
    lowering: Lowering = "eager",
    layers: Layers = 4,
    hidden: Hidden = 512,
    heads: Heads = 8,
    batch: Batch = 1,
    tokens: Tokens = 128,
    attention: Attention = "eager",
) -> None:
    """Find the first rewrite after which MODEL differs from eager, and write a program that shows it.

    Exit code 1 if there is one.
    """
    from effopt.compile import check_options
    from effopt.testing.bisect import bisect as search
    from effopt.testing.bisect import write_repro

    options = {"passes": passes, "disable": disable, "lowering": lowering}
    check_options(options)
    check_output(repro)
    example = load(model, Size(layers, hidden, heads, batch, tokens, attention))
    console = errors()
    with progress("searching"):
        try:
            culprit = search(_make_from(example), options, rtol=rtol or None, say=console.print)
        except ValueError as error:
            raise CheckFailed(str(error)) from error
    if culprit is None:
        output().print(Text("no rewrite makes it differ from eager", style="green"))
        return
    write_repro(culprit, repro)
    where = culprit.applied
    output().print(Text(f"rewrite {culprit.fuel} is wrong: {where.pass_name}", style="red"))
    for what, value in (("node", where.node), ("layer", where.layer), ("line", where.source)):
        output().print(Text(f"  {what}: {value or '(unknown)'}"))
    output().print(Text(f"  error: {culprit.error}\n  {repro} shows it by itself"))
    raise typer.Exit(1)


def _make_from(example: Example) -> Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Copies of the model and its inputs; keyword inputs are bound, since the search knows positions only."""

    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        model = copy.deepcopy(example.model)
        return _bound(model, copy.deepcopy(example.kwargs)), copy.deepcopy(example.args)

    return make


def _bound(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    if not kwargs:
        return model

    def run(*args: Any) -> Any:
        return model(*args, **kwargs)

    return run
