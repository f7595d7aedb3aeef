"""A report as one HTML page that needs nothing else: no script, font or image from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

import torch

from effopt.graph.provenance import template_of
from effopt.plugins.render.block import block_section
from effopt.plugins.render.compressed import compressed_layers, is_compressed
from effopt.plugins.render.grouping import by_reason, compact, kernels, natural, near_misses, short_source
from effopt.plugins.render.quantities import change, duration, scaled
from effopt.plugins.render.record import effopt_version

if TYPE_CHECKING:
    from effopt.plugins.report import GraphReport, Report

_LINES_SHOWN = 3
_OPS_SHOWN = 14
_HUES = (222, 158, 38, 0, 275, 190, 95, 330)  # one a stage, in order, readable on both backgrounds


def as_page(report: Report) -> str:
    """The whole page."""
    body = [_header(report)]
    for number, graph in enumerate(report.graphs, start=1):
        body += _graph(graph, number, len(report.graphs))
    return whole_page("effopt report", body)


def whole_page(title: str, body: Iterable[str]) -> str:
    """A page of parts that are HTML already."""
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    versions = f"effopt {effopt_version()}, torch {torch.__version__}."
    return template.substitute(
        title=escape(title),
        body="\n".join(body),
        footer=f"{escape(versions)} Operations and bytes are predicted as if every op were one kernel.",
    )


def _header(report: Report) -> str:
    totals = _totals(report.graphs)
    seconds = sum(sum(g.seconds.values()) for g in report.graphs)
    cards = [
        (len(report.graphs), "graphs compiled" if len(report.graphs) != 1 else "graph compiled"),
        (len(report.applied), "rewrites"),
        (sum(report.ops.values()), "canonical ops"),
        (len(report.rejected), "left alone, with reasons"),
        (duration(seconds), "to compile, Dynamo's tracing aside"),
    ]
    if totals["bytes_before"]:
        moved = change(totals["bytes_before"], totals["bytes_after"])
        cards.insert(3, (moved, f"bytes moved, {scaled(totals['bytes_before'], 'B')} before"))
    shown = "".join(
        f'<div class="card"><b>{escape(str(v))}</b><span class="dim">{escape(k)}</span></div>'
        for v, k in cards
    )
    faults = "".join(f'<p class="note">Plugin fault: {escape(fault)}</p>' for fault in report.faults)
    return f'<h1>effopt report</h1><div class="cards">{shown}</div>{faults}'


def _totals(graphs: Sequence[GraphReport]) -> Counter[str]:
    total: Counter[str] = Counter()
    for graph in graphs:
        total.update(graph.cost)
    return total


def _graph(graph: GraphReport, number: int, of: int) -> Iterator[str]:
    mode = "training" if graph.training else "inference"
    yield f"<h2>Graph {number} of {of}</h2>"
    sizes = f"{graph.nodes_before} nodes before the passes, {graph.nodes_after} after"
    yield f'<p class="dim">{mode}, {sizes}.</p>'
    if graph.refused:
        yield f'<section><p class="note">Left as it is: {escape(graph.refused)}</p></section>'
        return
    yield _section("What each pass did", _applied(graph))
    if is_compressed(graph):
        yield _section("Compressed, layer by layer", compressed_layers(graph, table))
    yield _section("Where it was done", _layers(graph))
    if graph.block is not None and graph.block.before:
        yield _section(*block_section(graph.block))
    if graph.op_costs:
        yield _section("Where the work is", _costs(graph))
    yield _section("Left alone, and why", _left_alone(graph))
    if graph.lowerings:
        yield _section("Kernels", _kernels(graph))
    if graph.checks:
        yield _section("Checks", _checks(graph))
    yield _section("Time", _times(graph))
    pipeline = f"<p><code>{escape(graph.pipeline)}</code></p>"
    yield f'<details><summary class="dim">Pipeline as text</summary>{pipeline}</details>'


def _section(heading: str, content: str) -> str:
    return f"<section><h3>{escape(heading)}</h3>{content}</section>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells; a heading that begins with `#` is a column of numbers."""
    kinds = [' class="n"' if h.startswith("#") else "" for h in headings]
    head = "".join(f"<th{kind}>{escape(h.lstrip('#'))}</th>" for h, kind in zip(headings, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def chip(text: str, kind: str = "") -> str:
    """A short label."""
    return f'<span class="chip {kind}">{escape(text)}</span>'


def _applied(graph: GraphReport) -> str:
    if not graph.applied:
        return '<p class="note">No pass applied.</p>'
    rows = []
    for name, count in Counter(a.pass_name for a in graph.applied).items():
        records = [a for a in graph.applied if a.pass_name == name]
        ops = "".join(chip(op, "good") for op in dict.fromkeys(a.op for a in records))
        sources = tuple(dict.fromkeys(short_source(a.source) for a in records if a.source))
        where = "<br>".join(escape(layer) for layer in compact(a.layer for a in records))
        rows.append((chip(name), str(count), ops, where, _lines_of_model(sources)))
    return table(("pass", "#times", "gives", "where", "line of the model"), rows)


def _lines_of_model(sources: Sequence[str]) -> str:
    """The first few, with all of them in the tooltip."""
    shown = "<br>".join(escape(source) for source in sources[:_LINES_SHOWN])
    more = f"<br>and {len(sources) - _LINES_SHOWN} more" if len(sources) > _LINES_SHOWN else ""
    return f'<span class="dim" title="{escape("; ".join(sources))}">{shown}{more}</span>'


def _layers(graph: GraphReport) -> str:
    """One row a layer, equal layers as one, indented by depth: what was done there and what was not."""
    done: dict[str, Counter[str]] = {}
    left: dict[str, Counter[str]] = {}
    for applied in graph.applied:
        done.setdefault(applied.layer, Counter())[applied.pass_name] += 1
    for rejected in graph.rejected:
        left.setdefault(rejected.layer, Counter())[rejected.pass_name] += 1
    groups: dict[tuple[object, ...], list[str]] = {}
    for layer in sorted({*done, *left}, key=lambda path: (natural(template_of(path)), natural(path))):
        key = (
            template_of(layer),
            tuple(done.get(layer, Counter()).items()),
            tuple(left.get(layer, Counter()).items()),
        )
        groups.setdefault(key, []).append(layer)
    rows = []
    for layers in groups.values():
        first = layers[0]
        depth = first.count(".") if first else 0
        paths = "<br>".join(escape(p) for p in compact(layers))
        path = f'<div style="padding-left:{min(depth, 6) * 12}px">{paths}</div>'
        rows.append((path, _chips(done.get(first), "good"), _chips(left.get(first), "warn")))
    if not rows:
        return '<p class="dim">Nothing was applied or refused anywhere.</p>'
    return table(("layer", "applied", "left alone"), rows)


def _chips(counts: Counter[str] | None, kind: str) -> str:
    shown = (counts or Counter()).items()
    return "".join(chip(name if n == 1 else f"{name} x{n}", kind) for name, n in shown)


def _costs(graph: GraphReport) -> str:
    before, after = graph.op_costs.get("before", {}), graph.op_costs.get("after", {})
    most = max((c.bytes_moved for c in (*before.values(), *after.values())), default=0.0) or 1.0
    rows = []
    for name in sorted(
        {*before, *after}, key=lambda n: -max(c[n].bytes_moved for c in (before, after) if n in c)
    ):
        cells = [f"<code>{escape(name)}</code>"]
        for costs in (before, after):
            cost = costs.get(name)
            if cost is None:
                cells += ["", "", ""]
                continue
            meter = f'<span class="meter"><i style="width:{100 * cost.bytes_moved / most:.1f}%"></i></span>'
            cells += [str(cost.calls), scaled(cost.flops, "FLOP"), scaled(cost.bytes_moved, "B") + meter]
        rows.append(tuple(cells))
    total = graph.cost
    heads = ("op", "#calls before", "#FLOPs", "#bytes", "#calls after", "#FLOPs", "#bytes")
    shown = table(heads, rows[:_OPS_SHOWN])
    if len(rows) > _OPS_SHOWN:
        rest = table(heads, rows[_OPS_SHOWN:])
        shown += f'<details><summary class="dim">{len(rows) - _OPS_SHOWN} more ops</summary>{rest}</details>'
    line = (
        f"{scaled(total['flops_before'], 'FLOP')} and {scaled(total['bytes_before'], 'B')} moved before,"
        f" {scaled(total['flops_after'], 'FLOP')} and {scaled(total['bytes_after'], 'B')} after;"
        f" values alive at once: at most {scaled(total['peak_bytes_before'], 'B')} before,"
        f" {scaled(total['peak_bytes_after'], 'B')} after."
    )
    return f'<p class="dim">{line}</p>{shown}'


def _left_alone(graph: GraphReport) -> str:
    groups = near_misses(graph.rejected)
    if not groups:
        return '<p class="dim">No place was refused.</p>'
    rows = []
    for name, reason, place in groups:
        where = "<br>".join(escape(layer) for layer in place.layers)
        sources = _lines_of_model(place.sources)
        rows.append((chip(name, "warn"), str(place.count), escape(reason), where, sources))
    return table(("pass", "#times", "because", "where", "line of the model"), rows)


def _kernels(graph: GraphReport) -> str:
    rows = []
    for op, kernel, count, refused in kernels(graph.lowerings):
        reasons = "<br>".join(f"<b>{escape(names)}</b> {escape(why)}" for names, why in by_reason(refused))
        rows.append((f"<code>{escape(op)}</code>", chip(kernel, "good"), str(count), reasons))
    return table(("op", "kernel", "#times", "not taken, because"), rows)


def _checks(graph: GraphReport) -> str:
    counts = "".join(chip(f"{name} {count}") for name, count in sorted(graph.checks.items()))
    reasons = [(str(count), escape(reason)) for reason, count in graph.unchecked.most_common()]
    return counts + (table(("#unchecked", "because"), reasons) if reasons else "")


def _times(graph: GraphReport) -> str:
    total = sum(graph.seconds.values()) or 1.0
    items = sorted(graph.seconds.items(), key=lambda item: -item[1])
    spans, rows = [], []
    for index, (stage, seconds) in enumerate(items):
        colour = f"hsl({_HUES[index % len(_HUES)]} 55% 55%)"
        share = 100 * seconds / total
        spans.append(f'<span style="width:{share:.2f}%;background:{colour}" title="{escape(stage)}"></span>')
        mark = f'<span style="color:{colour}">&#9632;</span> {escape(stage)}'
        rows.append((mark, duration(seconds), f"{share:.1f} %"))
    return f'<div class="times">{"".join(spans)}</div>{table(("stage", "#time", "#share"), rows)}'
