"""`effopt tune`: the lossy passes that a language model takes within a budget of quality."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from effopt.commands.language_model import DTypeName, LanguageModelName, TextPaths, load_language_model
from effopt.commands.output_file import check_output
from effopt.commands.terminal import output, progress
from effopt.plugins.render.grouping import compact

if TYPE_CHECKING:
    from effopt.tuning.report import TriedChoice, TuningReport


def tune(
    model: LanguageModelName,
    budget: Annotated[
        str, typer.Option(help="What must hold: kl<=0.05, agreement>=0.98, bits_per_byte<=1.02x.")
    ],
    passes: Annotated[
        list[str] | None,
        typer.Option(help="Passes to choose from; several of one are alternatives. May be repeated."),
    ] = None,
    objective: Annotated[str, typer.Option(help="What is to fall: seconds, bytes or flops.")] = "seconds",
    texts: TextPaths = None,
    windows: Annotated[int, typer.Option(min=2, help="Texts to measure on, a window of each.")] = 12,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 256,
    dtype: DTypeName = "float32",
    save: Annotated[str, typer.Option(help="Write the plan as JSON.", show_default=False)] = "",
    json_file: Annotated[
        str, typer.Option("--json", help="Write the report as JSON.", show_default=False)
    ] = "",
) -> None:
    """Choose lossy passes for MODEL, layer by layer, within a budget; measure, and revert what breaks it.

    Exit code 1 if the uncompressed model breaks the budget.
    """
    from effopt.tuning.batches import TEXTS
    from effopt.tuning.budget import Budget
    from effopt.tuning.tune import tune as search

    Budget.parse(budget)
    for path in (save, json_file):
        check_output(path)
    with progress("loading") as tell:
        judged = load_language_model(model, texts or (), dtype)
        context = min(context, judged.context or context)
        tier = dataclasses.replace(
            TEXTS, context=context, stride=context, texts=windows, tokens_per_text=context + 1
        )
        plan = search(
            judged.model, judged.texts, budget, passes, objective=objective, tier=tier, progress=tell
        )
    report: TuningReport = plan.report
    console = output()
    console.print(as_table(report))
    console.print(
        Text(f"saves: of the {report.objective} of a call, alone; budget: the share used, alone", style="dim")
    )
    color = "red" if report.impossible else "green" if report.accepted else "yellow"
    console.print(Text(report.summary(), style=color))
    if save:
        plan.save(save)
    if json_file:
        report.to_json(json_file)
    if report.impossible:
        raise typer.Exit(1)


def as_table(report: TuningReport) -> Table:
    """One row a choice, what was accepted first; then the places where nothing is offered, by reason."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("place", overflow="fold")
    table.add_column("choice", overflow="fold")
    table.add_column("saves", justify="right")
    table.add_column("budget", justify="right")
    table.add_column("", overflow="fold")
    for choice in (*report.accepted, *report.reverted):
        table.add_row(*_row(choice))
    reasons: dict[tuple[str, str], list[str]] = {}
    for place in report.left:
        reason = place.reason.replace(place.path, "it") if place.path else place.reason
        reasons.setdefault((place.pass_name, reason), []).append(place.path)
    for (name, reason), paths in reasons.items():
        table.add_row(Text("\n".join(compact(paths))), Text(name), "", "", Text(reason, style="dim"))
    return table


def _row(choice: TriedChoice) -> tuple[Text | str, ...]:
    done = Text("accepted", style="green") if choice.is_accepted else Text(choice.reason, style="dim")
    share = f"{choice.budget_share:.1%}" if choice.alone is not None else "-"
    what = f"{choice.pass_name} {choice.told}"
    return Text(choice.path), Text(what), f"{choice.saving:.2%}", share, done
