"""The part of the page that shows, layer by layer, what lossy passes did and why they left the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from effopt.plugins.render.grouping import general, natural
from effopt.plugins.render.quantities import change, scaled

if TYPE_CHECKING:
    from effopt.graph.rewrite import Applied, Rejected
    from effopt.passes.plan import PlannedStack
    from effopt.plugins.report import GraphReport

HEADINGS = ("layer", "decided", "#weights", "#bytes before", "#bytes after", "left as it was, because")


def is_compressed(graph: GraphReport) -> bool:
    """Whether there is anything to show."""
    return bool(graph.planned) or any(a.bytes_before for a in graph.applied)


def compressed_rows(graph: GraphReport) -> list[tuple[str, str, str, str, str, str]]:
    """One row of text a layer, in the model's order, columns as `HEADINGS`; what is outside of them last."""
    decided: dict[str, list[str]] = {}
    for section in graph.planned:
        for stack in section.stacks:
            for entry in stack.layers:
                told = _told(section.name, entry.decision, stack)
                decided.setdefault(entry.path, []).extend([told] if told else [])
    replaced = [a for a in graph.applied if a.bytes_before]
    lossy = {section.name for section in graph.planned} | {a.pass_name for a in replaced}
    refused = [r for r in graph.rejected if r.pass_name in lossy]
    layers = list(decided) or _numbered([*(a.layer for a in replaced), *(r.layer for r in refused)])
    rows = [_row(path, decided.get(path, []), *_under(path, replaced, refused)) for path in layers]

    def outside(layer: str) -> bool:
        return not any(_is_under(layer, path) for path in layers)

    rest = [a for a in replaced if outside(a.layer)], [r for r in refused if outside(r.layer)]
    return [*rows, _row("(outside of the layers)", [], *rest)] if any(rest) else rows


def compressed_layers(graph: GraphReport, table: Callable[[Sequence[str], Any], str]) -> str:
    """The rows as HTML, with totals above."""
    rows = compressed_rows(graph)
    replaced = [a for a in graph.applied if a.bytes_before]
    before, after = sum(a.bytes_before for a in replaced), sum(a.bytes_after for a in replaced)
    total = (
        f'<p class="dim">{len(replaced)} weights replaced: {scaled(before, "B")} before,'
        f" {scaled(after, 'B')} after ({change(before, after)}).</p>"
        if replaced
        else ""
    )
    return total + table(HEADINGS, [[escape(cell) for cell in row] for row in rows])


def _row(
    path: str, decided: Sequence[str], replaced: Sequence[Applied], refused: Sequence[Rejected]
) -> tuple[str, str, str, str, str, str]:
    before, after = sum(a.bytes_before for a in replaced), sum(a.bytes_after for a in replaced)
    reasons = dict.fromkeys(
        f"{r.pass_name}, {part}: {general(r.reason)}" if (part := r.layer.removeprefix(path).strip("."))
        else f"{r.pass_name}: {general(r.reason)}"
        for r in refused
    )  # fmt: skip
    return (
        path,
        "; ".join(decided) or "as it is",
        str(len(replaced)) if replaced else "",
        scaled(before, "B") if replaced else "",
        scaled(after, "B") if replaced else "",
        "; ".join(reasons),
    )


def _told(name: str, decision: Any, stack: PlannedStack) -> str:
    if decision is None:
        return ""
    if isinstance(decision, int) and not isinstance(decision, bool):
        return f"{name}: {stack.layers[decision].path}"
    return f"{name}: {decision if isinstance(decision, str) else json.dumps(decision)}"


def _under(
    path: str, replaced: Sequence[Applied], refused: Sequence[Rejected]
) -> tuple[list[Applied], list[Rejected]]:
    return (
        [a for a in replaced if _is_under(a.layer, path)],
        [r for r in refused if _is_under(r.layer, path)],
    )


def _is_under(layer: str, path: str) -> bool:
    return layer == path or layer.startswith(f"{path}.")


def _numbered(layers: Iterable[str]) -> list[str]:
    """`model.layers.3.mlp.up` -> `model.layers.3`: the layers of a model, where no pass decided by layer."""
    found = set()
    for layer in layers:
        parts = layer.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            found.add(".".join(parts[: number + 1]))
    return sorted(found, key=natural)
