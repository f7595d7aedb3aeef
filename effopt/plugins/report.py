"""What a compile call did: the records, and how they are gathered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch.fx import Graph

from effopt.backends.outline import Outlined
from effopt.errors import OptionError
from effopt.graph.analyses.liveness import liveness
from effopt.graph.analyses.roofline import OpCost, roofline
from effopt.graph.ops.base import Op
from effopt.graph.printing import Line, lines, nodes_under, repeated_layer
from effopt.graph.rewrite import Applied, PassResult, Rejected
from effopt.passes.plan import Section

if TYPE_CHECKING:
    from rich.console import RenderableType

_WHOLE_GRAPH_LINES = 400


@dataclass
class LoweringRecord:
    """The kernel chosen for one canonical op of the graph."""

    node: str
    op: str
    kernel: str
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class BlockListing:
    """One block of the model as it was captured, and as the passes left it."""

    layer: str
    """Module path of the block; empty if nothing is repeated and the whole graph is shown."""
    before: tuple[Line, ...] = ()
    after: tuple[Line, ...] = ()


@dataclass
class GraphReport:
    """One compiled graph. A model with graph breaks, or with prefill and decode, has several."""

    pipeline: str = ""
    training: bool = False
    nodes_before: int = 0
    nodes_after: int = 0
    refused: str = ""
    """Why the whole graph was left as it is; empty if it was not."""
    applied: list[Applied] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    planned: list[Section] = field(default_factory=list)
    """What passes that decide layer by layer decided, in order."""
    ops: Counter[str] = field(default_factory=Counter)
    lowerings: list[LoweringRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Time per stage (`capture`, `check`, `backend`, and each pass as `pass:<name>`)."""
    cost: dict[str, float] = field(default_factory=dict)
    """Predicted `flops_before`, `flops_after`, `bytes_before`, `bytes_after`, `peak_bytes_before`,
    `peak_bytes_after`, each as if every op were one kernel. Empty unless someone reads the report."""
    op_costs: dict[str, Mapping[str, OpCost]] = field(default_factory=dict)
    """`before` and `after`: op name -> its calls, added up."""
    outlined: list[Outlined] = field(default_factory=list)
    """Repeated blocks compiled once."""
    block: BlockListing | None = None
    checks: Counter[str] = field(default_factory=Counter)
    """How many rewrites were `verified`, `cached`, `unchecked`, `failed`."""
    unchecked: Counter[str] = field(default_factory=Counter)
    """Why rewrites were not checked -> how many."""
    faults: list[str] = field(default_factory=list)
    """Passes that raised or left an invalid graph, and were undone."""

    def take(self, result: PassResult) -> None:
        """Add one pass's records."""
        self.applied.extend(result.applied)
        self.rejected.extend(result.rejected)
        self.faults.extend(result.faults)

    def survey(self, moment: Literal["before", "after"], graph: Graph, ops: Mapping[str, Op]) -> None:
        """Note cost, peak memory and one block of `graph`, as it is before or after the passes."""
        cost = roofline(graph, ops)
        self.op_costs[moment] = cost.by_op
        self.cost[f"flops_{moment}"] = cost.flops
        self.cost[f"bytes_{moment}"] = cost.bytes_moved
        self.cost[f"peak_bytes_{moment}"] = liveness(graph).peak_bytes
        if moment == "before":
            layer = repeated_layer(graph)
            self.block = BlockListing(layer, before=lines(nodes_under(graph, layer)[:_WHOLE_GRAPH_LINES]))
        elif self.block is not None:
            after = lines(nodes_under(graph, self.block.layer)[:_WHOLE_GRAPH_LINES])
            self.block = BlockListing(self.block.layer, self.block.before, after)


@dataclass
class Report:
    """Everything that was compiled while it was recording."""

    graphs: list[GraphReport] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Plugins that failed, and how."""

    @property
    def applied(self) -> list[Applied]:
        """Rewrites made, over all graphs."""
        return [a for g in self.graphs for a in g.applied]

    @property
    def rejected(self) -> list[Rejected]:
        """Near-misses and refusals, over all graphs."""
        return [r for g in self.graphs for r in g.rejected]

    @property
    def counts(self) -> Counter[str]:
        """Pass name -> times applied."""
        return Counter(a.pass_name for a in self.applied)

    @property
    def ops(self) -> Counter[str]:
        """Canonical op -> count in the final graphs before lowering."""
        total: Counter[str] = Counter()
        for graph in self.graphs:
            total.update(graph.ops)
        return total

    @property
    def lowerings(self) -> list[LoweringRecord]:
        """Kernel choices, over all graphs."""
        return [record for g in self.graphs for record in g.lowerings]

    def __str__(self) -> str:
        from effopt.plugins.render.text import as_text

        return as_text(self)

    def __rich__(self) -> RenderableType:
        from effopt.plugins.render.text import renderable

        return renderable(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """All records as JSON text (layout `effopt-report/1`), also written to `path` if one is given."""
        from effopt.plugins.render.record import as_data

        return _written(json.dumps(as_data(self), indent=1), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page: no script, font or image from elsewhere. Also written to `path`."""
        from effopt.plugins.render.page import as_page

        return _written(as_page(self), path)

    def write(self, path: str | Path) -> None:
        """Write JSON or HTML, as the suffix of `path` says. Raises OptionError for another suffix."""
        writers = {".json": self.to_json, ".html": self.to_html}
        if Path(path).suffix not in writers:
            raise OptionError(f"a report is written to a .json or .html file, got {str(path)!r}")
        writers[Path(path).suffix](path)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
