"""A trade-off as tables for the terminal, and as one HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from effopt.plugins.render.page import chip, table, whole_page
from effopt.plugins.render.quantities import scaled
from effopt.quality.bootstrap import Interval
from effopt.tradeoff.result import AXES, Row, Tradeoff

Cells = list[str]
_FRONT_COLUMN = 7
_RESOLVED = 1e-7  # nats: log-probabilities are float32


def quality_cells(result: Tradeoff) -> tuple[Cells, list[Cells]]:
    """(headings, one list a row): what each way costs in quality, with its 95 % interval."""
    distances = sorted({d for row in result.rows if row.quality is not None for d in row.quality.recall})
    recall = [f"recall@{distance}" for distance in distances]
    rows = []
    for row in result.rows:
        figures = {} if row.quality is None else row.quality.metrics
        cells = [_interval(figures.get(name)) for name in ("kl", "bits_per_byte", "agreement")]
        rows.append([row.way.name, *cells, *(_share(figures.get(name)) for name in recall)])
    return ["", "KL, nats a token", "bits per byte", "agreement", *recall], rows


def cost_cells(result: Tradeoff) -> tuple[Cells, list[Cells]]:
    """(headings, one list a row): what each way costs in bytes, operations and time."""
    fronts = [(axis, result.front(axis)) for axis in AXES]
    rows = []
    for index, row in enumerate(result.rows):
        speedup = result.speedup(row)
        seconds = row.seconds_a_token
        rows.append(
            [
                row.way.name,
                _amount(row.weight_bytes, "B"),
                _amount(row.kv_bytes, "B"),
                _amount(row.flops_a_token, "FLOP"),
                _amount(row.bytes_a_token, "B"),
                f"{1 / seconds:.3g}" if seconds else "-",
                f"{speedup.median:.2f}x ({speedup.low:.2f}..{speedup.high:.2f})" if speedup else "-",
                ", ".join(axis.short for axis, on_front in fronts if on_front[index]) or _why_not(row),
            ]
        )
    return ["", "weights", "KV", "FLOP/token", "moved/token", "tokens/s", "speed-up", "best KL for its"], rows


def notes(result: Tradeoff) -> list[tuple[str, str]]:
    """(way, what has to be known of its figures)."""
    found = []
    for row in result.rows:
        if row.error is not None:
            found.append((row.way.name, f"failed: {row.error}"))
        for left in row.untouched:
            places = f"left {left.places} {'place' if left.places == 1 else 'places'} as found: "
            found.append((row.way.name, f"{left.pass_name} {places if left.places else ''}{left.reason}"))
        found += [(row.way.name, note) for note in row.notes]
    return found


def _why_not(row: Row) -> str:
    if row.error is not None:
        return "failed"
    if row.is_refused:
        return "refused, see below" if any(left.places for left in row.untouched) else "changed nothing"
    return ""


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    value, low, high = (_figure(x) for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _figure(value: float) -> str:
    """Four decimals; two digits of what these would hide, but for what float32 does not resolve."""
    if abs(value) < _RESOLVED:
        return "0"
    return f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _share(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.2f}"


def _amount(value: float | None, unit: str) -> str:
    return "-" if value is None else scaled(value, unit)


def conditions(result: Tradeoff) -> str:
    """What it was measured on, and how to read it."""
    where, how, tier = result.machine, result.settings["decoding"], result.settings["tier"]
    device = where["accelerator"] or f"{where['processor']}, {where['threads']} threads"
    judged = next((row.quality.texts for row in result.rows if row.quality is not None), ())
    tokens = sum(text.tokens for text in judged)
    timed = f"greedy, measured, medians of {how['rounds']} interleaved rounds; speed-ups with quartiles"
    if not any(row.decode_s for row in result.rows):
        timed = "not measured"
    return (
        f"{result.settings['parameters'] / 1e6:.3g} M parameters, {result.settings['dtype']}, torch"
        f" {where['torch']} on {device}. Quality: {tokens} tokens of {len(judged)} texts in windows of"
        f" {tier['context']}, 95 % intervals over texts, against the uncompressed model run eagerly. Weights:"
        " all bytes that the model and its graphs hold."
        f" KV: one row of {how['cache_tokens']} tokens. A token: predicted, decoding with that cache."
        f" Tokens/s: {timed}."
    )


def as_tables(result: Tradeoff) -> RenderableType:
    """For the terminal."""
    parts: list[RenderableType] = [
        _table(*quality_cells(result)),
        Text(),
        _table(*cost_cells(result)),
        Text(),
    ]
    for name, note in notes(result):
        is_error = note.startswith("failed")
        parts.append(Text.assemble((name, "bold"), "  ", (note, "red" if is_error else "yellow")))
    parts.append(Text(conditions(result), style="dim"))
    return Group(*parts)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        is_number = 0 < index < _FRONT_COLUMN
        made.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        # Intervals stand below their figures, where the terminal is narrow.
        made.add_row(*(Text(cell.replace(" [", "\n[").replace(" (", "\n(")) for cell in row))
    return made


def as_page(result: Tradeoff, picture: bytes) -> str:
    """One HTML page with the tables, the notes and the picture in it."""
    image = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    parts = [f'<h1>Quality against cost</h1><p class="dim">{escape(conditions(result))}</p>']
    parts.append(
        f'<section><img alt="KL divergence against each cost" style="max-width:100%" src="{image}"></section>'
    )
    for heading, (headings, rows) in (("Quality", quality_cells(result)), ("Cost", cost_cells(result))):
        numbers = [name and f"#{name}" for name in headings]
        body = table(numbers, [[escape(cell) for cell in row] for row in rows])
        parts.append(f"<section><h3>{heading}</h3>{body}</section>")
    told = notes(result)
    if told:
        rows = [[chip(name, "warn"), escape(note)] for name, note in told]
        parts.append(f"<section><h3>To be known</h3>{table(('way', 'note'), rows)}</section>")
    return whole_page("effopt: quality against cost", parts)


def as_markdown(result: Tradeoff) -> str:
    """The two tables, the notes and the conditions, for a document."""
    parts = []
    for headings, rows in (quality_cells(result), cost_cells(result)):
        named = [[f"`{name}`", *cells] for name, *cells in rows]
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *named]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts += [f"- `{name}`: {note}" for name, note in notes(result)]
    return "\n\n".join([*parts, conditions(result)])
