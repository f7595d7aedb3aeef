"""The part of the page that shows one block of the model before and after the passes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from effopt.plugins.render.grouping import short_source

if TYPE_CHECKING:
    from effopt.graph.printing import Line
    from effopt.plugins.report import BlockListing


def block_section(block: BlockListing) -> tuple[str, str]:
    """(heading, content): ops by layer as a diagram, and the two listings side by side."""
    kept = {(n.name, n.op) for n in block.before} & {(n.name, n.op) for n in block.after}
    sides = "".join(
        f'<div><p class="dim">{word}: {len(nodes)} nodes</p>{_listing(nodes, kept, mark)}</div>'
        for word, nodes, mark in (("Before", block.before, "gone"), ("After", block.after, "new"))
    )
    listings = (
        f'<details open><summary class="dim">Listings</summary><div class="pair">{sides}</div></details>'
    )
    title = "The graph, before and after"
    if block.layer:
        title = f"One of the repeated blocks, before and after: {block.layer}"
    return title, _diagram(block, kept) + listings


def _diagram(block: BlockListing, kept: set[tuple[str, str]]) -> str:
    """A row a layer: the ops it had, those that went marked, and the ops it has, the new ones marked."""
    cells = ['<div class="dim">layer</div><div class="dim">before</div><div class="dim">after</div>']
    for layer in dict.fromkeys(n.layer for n in (*block.before, *block.after)):
        name = layer.removeprefix(block.layer).strip(".") or "(the block itself)"
        sides = "".join(
            f"<div>{_chips([n for n in side if n.layer == layer and n.op != 'item'], kept, kind)}</div>"
            for side, kind in ((block.before, "gone"), (block.after, "good"))
        )
        cells.append(f"<div><code>{escape(name)}</code></div>{sides}")
    return f'<div class="flow">{"".join(cells)}</div>'


def _chips(nodes: Sequence[Line], kept: set[tuple[str, str]], changed: str) -> str:
    chips = []
    for n in nodes:
        mark = "" if (n.name, n.op) in kept else changed
        chips.append(f'<span class="chip {mark}" title="{escape(n.text)}">{escape(n.op)}</span>')
    return "".join(chips)


def _listing(nodes: Sequence[Line], kept: set[tuple[str, str]], changed: str) -> str:
    rows, where = [], ""
    for node in nodes:
        place = "  ".join(w for w in (node.layer, short_source(node.source)) if w)
        if place != where:
            where = place
            rows.append(f'<div class="where">{escape(place)}</div>')
        mark = "" if (node.name, node.op) in kept else f' class="{changed}"'
        rows.append(f"<div{mark}>{escape(node.text)}</div>")
    return f'<div class="list code">{"".join(rows)}</div>'
