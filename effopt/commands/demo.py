"""`effopt demo`: a real architecture, from eager attention to a compiled and checked graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effopt.commands.bench import as_table, machine_line
from effopt.commands.model import Layers, Size, load
from effopt.commands.output_file import check_output
from effopt.commands.terminal import output, progress


def demo(
    layers: Layers = 4,
    hidden: Annotated[int, typer.Option(min=16, help="Hidden size.")] = 512,
    html: Annotated[str, typer.Option(help="Where the HTML page goes.")] = "effopt_report.html",
) -> None:
    """Compile a Llama with random weights; show what was done, how exact it is and how fast."""
    from effopt.bench import compare

    check_output(html)
    console = output()
    size = Size(layers=layers, hidden=hidden)
    console.print(
        f"[bold]Llama[/bold], {layers} layers, hidden {hidden}, {size.heads} heads, {size.tokens} tokens;"
        "\nrandom weights, attention as transformers spells it out. No line of the model is changed:\n\n"
        '    torch.compile(model, [green]backend="effopt"[/green])\n',
        highlight=False,
    )
    with progress("building the model") as tell:
        example = load("llama", size)
        result = compare(example.model, example.args, example.kwargs, rounds=9, progress=tell)
    report = result["effopt"].report
    console.print(report)
    console.print("\n[bold]Measured[/bold]")
    console.print(as_table(result))
    console.print(f"[dim]{machine_line(result)}[/dim]", highlight=False)
    report.to_html(html)
    console.print(f"\nThe whole report, with one block before and after: [bold]{Path(html).resolve()}[/bold]")
