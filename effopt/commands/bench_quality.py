"""`effopt bench quality`: what lossy passes cost in quality, and what they save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effopt.commands.language_model import DTypeName, LanguageModelName, TextPaths, load_language_model
from effopt.commands.model import JsonFile, Lowering
from effopt.commands.output_file import check_output
from effopt.commands.terminal import output, progress
from effopt.errors import OptionError

if TYPE_CHECKING:
    from effopt.tradeoff import Tradeoff, Way

DEFAULT = (
    "quantize-weights{bits=8}",
    "quantize-weights{bits=4,group=32}",
    "quantize-weights{bits=4,group=128}",
    "quantize-weights{bits=8},quantize-activations",
    "skip-layers{keep=0.9}",
    "skip-layers{keep=0.75}",
    "share-kv-across-layers{group=2}",
    "quantize-weights{bits=8},skip-layers{keep=0.9}",
)
"""Compared where nothing is asked for."""


def quality(
    model: LanguageModelName,
    passes: Annotated[
        list[str] | None,
        typer.Option(help="Passes to add, a row: quantize-weights{bits=4}. May be repeated."),
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="A plan (JSON) to carry out, a row. May be repeated.")
    ] = None,
    texts: TextPaths = None,
    full: Annotated[bool, typer.Option("--full", help="Judge by all of the texts and probes.")] = False,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds of decoding.")] = 9,
    dtype: DTypeName = "float32",
    json_file: JsonFile = "",
    html: Annotated[str, typer.Option(help="Write tables and picture as one HTML page.")] = "",
    png: Annotated[str, typer.Option(help="Write the picture.")] = "",
    lowering: Lowering = "auto",
) -> None:
    """Compare lossy passes on MODEL: quality, bytes, operations, decoding speed, and the Pareto front.

    Exit code 1 if a row failed.
    """
    for path, kind in ((json_file, ".json"), (html, ".html"), (png, ".png")):
        check_output(path, kind)
    from effopt.quality.texts import FULL, QUICK
    from effopt.tradeoff import Decoding, measure
    from effopt.tradeoff.chart import require_matplotlib
    from effopt.tradeoff.render import as_tables

    if html or png:
        require_matplotlib()
    ways = ways_of(passes or [], plan or [])
    with progress("loading") as tell:
        judged = load_language_model(model, texts or (), dtype)
        result = measure(
            judged.model,
            judged.texts,
            ways,
            probes=judged.probes,
            tier=FULL if full else QUICK,
            decoding=Decoding(rounds=rounds),
            lowering=lowering,
            progress=tell,
        )
    write(result, json_file, html, png)
    output().print(as_tables(result))
    if result.failed:
        raise typer.Exit(1)


def ways_of(passes: list[str], plans: list[str]) -> list[Way]:
    """The rows asked for, each once. Raises OptionError for a plan that is not there, PlanError for none."""
    from effopt.passes.plan import Plan
    from effopt.tradeoff import Way

    if missing := [path for path in plans if not Path(path).is_file()]:
        raise OptionError(f"there is no plan {missing[0]!r}: effopt.calibrate(...).save(path) writes one")
    if empty := [text for text in passes if not text.strip()]:
        raise OptionError(f"--passes {empty[0]!r} names no pass; the uncompressed model is always a row")
    asked = passes if passes or plans else DEFAULT
    planned = [Way(plan=Plan.load(path), label=f"plan {path}") for path in dict.fromkeys(plans)]
    return [*(Way(text) for text in dict.fromkeys(asked)), *planned]


def write(result: Tradeoff, json_file: str, html: str, png: str) -> None:
    """Write what was asked for."""
    from effopt.tradeoff.chart import as_png
    from effopt.tradeoff.render import as_page

    if json_file:
        Path(json_file).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    picture = as_png(result) if html or png else b""
    if png:
        Path(png).write_bytes(picture)
    if html:
        Path(html).write_text(as_page(result, picture), encoding="utf-8")
