"""A report for the terminal, by rich."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from effopt.plugins.render.grouping import by_reason, compact, kernels, near_misses
from effopt.plugins.render.quantities import change, duration, scaled

if TYPE_CHECKING:
    from effopt.plugins.report import GraphReport, Report

_MOST_REASONS = 24
_UNCHECKED_SHOWN = 3
_PASSES_SHOWN = 3  # slowest passes named in the line of times


def as_text(report: Report, width: int = 110) -> str:
    """The report as plain text, without colour."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable(report))
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.splitlines())


def renderable(report: Report) -> RenderableType:
    """What `rich.print(report)` shows."""
    parts: list[RenderableType] = [_headline(report)]
    for number, graph in enumerate(report.graphs, start=1):
        parts.append(Text(""))
        parts.append(_graph_headline(graph, number, len(report.graphs)))
        parts += [Padding(part, (0, 0, 0, 2)) for part in _sections(graph)]
    for fault in report.faults:
        parts.append(Text(f"plugin fault: {fault}", style="red"))
    return Group(*parts)


def _headline(report: Report) -> Text:
    if not report.graphs:
        return Text("effopt: no graph was compiled", style="bold yellow")
    sizes = f"{_many(len(report.graphs), 'graph')} · {_many(len(report.applied), 'rewrite')}"
    return Text(f"effopt: {sizes} · {len(report.rejected)} left alone", style="bold")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _graph_headline(graph: GraphReport, number: int, of: int) -> Text:
    mode = "training" if graph.training else "inference"
    head = Text(f"Graph {number} of {of}", style="bold cyan")
    head.append(f"  {mode}, {graph.nodes_before} -> {graph.nodes_after} nodes", style="not bold")
    return head


def _sections(graph: GraphReport) -> Iterator[RenderableType]:
    if graph.refused:
        yield Text(f"left as it is: {graph.refused}", style="yellow")
        return
    if graph.cost:
        yield _cost(graph)
    yield _applied(graph)
    if graph.ops:
        yield Text("ops        " + ", ".join(f"{name} {count}" for name, count in sorted(graph.ops.items())))
    if graph.checks:
        yield Text(
            "checks     " + ", ".join(f"{name} {count}" for name, count in sorted(graph.checks.items()))
        )
    for reason, count in graph.unchecked.most_common(_UNCHECKED_SHOWN):
        yield Text(f"unchecked  {count}: {reason}", style="yellow")
    for block in graph.outlined:
        what = f"{block.name}: {block.nodes} nodes, {block.count} copies"
        done = Text(f"outlined   {what} compiled once")
        yield Text(f"not shared {what} compiled one by one: {block.left}") if block.left else done
    if graph.seconds:
        yield Text("time       " + _times(graph))
    if graph.rejected:
        yield _left_alone(graph)
    if graph.lowerings:
        yield _kernels(graph)


def _cost(graph: GraphReport) -> Text:
    cost = graph.cost
    flops, moved = (
        f"{scaled(cost[f'{key}_before'], unit)} -> {scaled(cost[f'{key}_after'], unit)}"
        f" ({change(cost[f'{key}_before'], cost[f'{key}_after'])})"
        for key, unit in (("flops", "FLOP"), ("bytes", "B"))
    )
    return Text(f"predicted  {flops}, {moved} moved if every op is one kernel")


def _applied(graph: GraphReport) -> RenderableType:
    if not graph.applied:
        return Text("applied    nothing", style="yellow")
    table = _table("applied", "times", "where")
    table.columns[1].justify = "right"
    for name, count in Counter(a.pass_name for a in graph.applied).items():
        layers = compact(a.layer for a in graph.applied if a.pass_name == name)
        table.add_row(Text(name, style="green"), str(count), ", ".join(layers))
    return table


def _left_alone(graph: GraphReport) -> RenderableType:
    table = _table("left alone by", "times", "because", "where")
    table.columns[1].justify = "right"
    groups = near_misses(graph.rejected)
    for name, reason, place in groups[:_MOST_REASONS]:
        where = ", ".join(place.layers) + (f"  {place.sources[0]}" if place.sources else "")
        table.add_row(Text(name, style="yellow"), str(place.count), Text(reason), Text(where))
    if len(groups) > _MOST_REASONS:
        return Group(table, Text(f"and {len(groups) - _MOST_REASONS} more reasons: see to_json or to_html"))
    return table


def _kernels(graph: GraphReport) -> RenderableType:
    table = _table("op", "kernel", "times", "not taken, because")
    table.columns[2].justify = "right"
    for op, kernel, count, refused in kernels(graph.lowerings):
        reasons = "; ".join(f"{names}: {reason}" for names, reason in by_reason(refused))
        table.add_row(op, Text(kernel, style="green"), str(count), Text(reasons))
    return table


def _times(graph: GraphReport) -> str:
    passes = {k.removeprefix("pass:"): v for k, v in graph.seconds.items() if k.startswith("pass:")}
    stages = [f"{k} {duration(v)}" for k, v in graph.seconds.items() if not k.startswith("pass:")]
    if passes:
        slowest = sorted(passes.items(), key=lambda item: -item[1])[:_PASSES_SHOWN]
        named = ", ".join(f"{k} {duration(v)}" for k, v in slowest)
        stages.insert(1, f"passes {duration(sum(passes.values()))} ({named})")
    return ", ".join(stages)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold", vertical="top")
    return table
