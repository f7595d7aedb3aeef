"""A graph as it was, so that a pass that failed can be undone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg


@dataclass(frozen=True)
class _Saved:
    node: Node
    target: Any
    args: Any
    kwargs: Any
    meta: dict[Any, Any]


class Snapshot:
    """Arguments, targets, order and metadata of every node; about 1 us a node to take."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._saved = [_Saved(n, n.target, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes]

    def restore(self) -> None:
        """Put the graph back. Nodes that still exist are kept, erased ones are made again."""
        alive = set(self._graph.nodes)
        now = {saved.node: self._revive(saved, alive) for saved in self._saved}
        kept = set(now.values())
        for saved in self._saved:
            node = now[saved.node]
            node.target, node.meta = saved.target, saved.meta
            node.args, node.kwargs = map_arg((saved.args, saved.kwargs), now.__getitem__)
        added = [node for node in self._graph.nodes if node not in kept]
        for node in added:
            node.args, node.kwargs = (), {}
        for node in added:
            self._graph.erase_node(node)
        ordered = [now[saved.node] for saved in self._saved]
        for before, after in itertools.pairwise(ordered):
            if before.next is not after:
                before.append(after)

    def _revive(self, saved: _Saved, alive: set[Node]) -> Node:
        if saved.node in alive:
            return saved.node
        return self._graph.create_node(saved.node.op, saved.target, (), {}, name=saved.node.name)
