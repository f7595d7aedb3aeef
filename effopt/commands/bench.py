"""`effopt bench`: eager, Inductor and effopt side by side; `effopt bench quality` is one more command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from typer.core import TyperGroup

from effopt.commands.bench_quality import quality
from effopt.commands.model import (
    Attention,
    Batch,
    Disable,
    Heads,
    Hidden,
    JsonFile,
    Layers,
    Model,
    Passes,
    Size,
    Tokens,
    Train,
    load,
)
from effopt.commands.output_file import check_output
from effopt.commands.terminal import output, progress

if TYPE_CHECKING:
    from effopt.bench import Comparison


class SpeedByDefault(TyperGroup):
    """A group whose first word may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `speed` in front of what names no command."""
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["speed", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    help="Measure on this machine. `effopt bench MODEL` is `effopt bench speed MODEL`.", cls=SpeedByDefault
)


@bench.command()
def speed(
    model: Model = "llama",
    passes: Passes = "",
    disable: Disable = "",
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 15,
    json_file: JsonFile = "",
    train: Train = False,
    layers: Layers = 4,
    hidden: Hidden = 512,
    heads: Heads = 8,
    batch: Batch = 1,
    tokens: Tokens = 128,
    attention: Attention = "eager",
) -> None:
    """Compare eager, Inductor and effopt on MODEL: cold compile time, latency, error.

    Latencies are medians of interleaved rounds; ratios are taken round by round, with their quartiles.
    """
    from effopt.bench import EAGER, INDUCTOR, Way, compare
    from effopt.compile import check_options, effopt

    options = {"passes": passes, "disable": disable}
    check_options(options)
    check_output(json_file)
    example = load(model, Size(layers, hidden, heads, batch, tokens, attention))
    with progress("starting") as tell:
        ways = (EAGER, INDUCTOR, Way("effopt", effopt, options))
        result = compare(
            example.model, example.args, example.kwargs, ways, train=train, rounds=rounds, progress=tell
        )
    console = output()
    console.print(as_table(result))
    console.print(f"[dim]{machine_line(result)}[/dim]", highlight=False)
    if json_file:
        Path(json_file).write_text(json.dumps(as_data(result), indent=1) + "\n", encoding="utf-8")


bench.command()(quality)


def as_table(result: Comparison) -> Table:
    """One row a way."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    headings = ("compile", "latency", "against eager", "against inductor", "error against eager")
    for heading in headings:
        table.add_column(heading, justify="right")
    for way in result.measured:
        ratios = [_ratio(result, way.name, other) for other in ("eager", "inductor")]
        compiled = f"{way.compile_s:.1f} s" if way.compile_s else "-"
        table.add_row(way.name, compiled, f"{way.latency_s * 1e3:.3g} ms", *ratios, f"{way.error:.1e}")
    return table


def _ratio(result: Comparison, name: str, over: str) -> str:
    if name == over or all(way.name != over for way in result.measured):
        return "-"
    ratio = result.speedup(name, over)
    return f"{ratio.median:.2f}x ({ratio.low:.2f}..{ratio.high:.2f})"


def machine_line(result: Comparison) -> str:
    """What it was measured on, and how to read it."""
    where = result.machine
    device = where["accelerator"] or f"{where['processor']}, {where['threads']} threads"
    rounds = len(result.measured[0].latencies_s)
    return (
        f"torch {where['torch']} on {device}; medians of {rounds} interleaved rounds, ratios with quartiles"
    )


def as_data(result: Comparison) -> dict[str, Any]:
    """For JSON: every round, and the ratios."""
    names = [way.name for way in result.measured]
    return {
        "format": "effopt-bench/1",
        "machine": dict(result.machine),
        "ways": [
            {
                "name": way.name,
                "compile_s": way.compile_s,
                "latency_s": way.latency_s,
                "latencies_s": way.latencies_s,
                "error": way.error,
                "counts": dict(way.report.counts),
            }
            for way in result.measured
        ],
        "speedups": {
            f"{name} over {other}": dataclasses.asdict(result.speedup(name, other))
            for name in names
            for other in names
            if name != other
        },
    }
