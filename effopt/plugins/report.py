"""What a compile call did: the records, and how they are gathered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from effopt.graph.rewrite import Applied, PassResult, Rejected


@dataclass
class LoweringRecord:
    """The kernel chosen for one canonical op of the graph."""

    node: str
    op: str
    kernel: str
    refused: tuple[tuple[str, str], ...]


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
    ops: Counter[str] = field(default_factory=Counter)
    lowerings: list[LoweringRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Time per stage (`capture`, `check`, `backend`, and each pass as `pass:<name>`)."""
    cost: dict[str, float] = field(default_factory=dict)
    """Predicted `flops_before`, `flops_after`, `bytes_before`, `bytes_after`."""
    dumps: dict[str, Any] = field(default_factory=dict)
    """Material for the HTML page: the graph of a block before and after."""
    checks: Counter[str] = field(default_factory=Counter)
    """How many rewrites were `verified`, `cached`, `unchecked`, `failed`."""

    def take(self, result: PassResult) -> None:
        """Add one pass's records."""
        self.applied.extend(result.applied)
        self.rejected.extend(result.rejected)


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
