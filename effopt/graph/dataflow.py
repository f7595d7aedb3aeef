"""Questions about a graph: its calls, def-use, convexity and order. networkx inside, FX outside."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterable
from typing import Any

import networkx as nx
from torch.fx import Graph, Node


def calls_of(graph: Graph, targets: Iterable[Any]) -> list[Node]:
    """All calls of `targets`, in graph order, from the index that FX keeps."""
    found = [
        n for t in dict.fromkeys(targets) for n in graph.find_nodes(op="call_function", target=t, sort=False)
    ]
    return sorted(found)


def calls_down_to(roots: Iterable[Node], operands: Collection[Node]) -> set[Node]:
    """All calls that `roots` are computed by, themselves included, down to `operands`, those excluded."""
    found, waiting = set[Node](), list(roots)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in operands and node.op == "call_function":
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def def_use(nodes: Iterable[Node]) -> nx.DiGraph:
    """The def-use relation restricted to `nodes`, edges from definition to use."""
    inside = list(nodes)
    graph = nx.DiGraph()
    graph.add_nodes_from(inside)
    members = set(inside)
    graph.add_edges_from((node, user) for node in inside for user in node.users if user in members)
    return graph


def is_convex(graph: Graph, region: Iterable[Node]) -> bool:
    """Whether no path leaves `region` and comes back: the region can then be one node.

    Only nodes between the first and the last of the region, in graph order, can lie on such a path.
    """
    members = set(region)
    first, last = min(members), max(members)
    window, node = [], first
    while node is not last:
        window.append(node)
        node = node.next
    window.append(last)
    relation = def_use(window)
    outside = relation.subgraph(n for n in window if n not in members)
    leaves = {u for m in members for u in relation.successors(m) if u not in members}
    enters = {p for m in members for p in relation.predecessors(m) if p not in members}
    return not any(enters & ({leaf} | nx.descendants(outside, leaf)) for leaf in leaves)


def sort_topologically(graph: Graph) -> None:
    """Reorder nodes so that definitions precede uses, moving as few as possible.

    Raises:
        ValueError: if the graph has a cycle; nothing is moved then.
    """
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    waiting = {node: len(node.all_input_nodes) for node in nodes}
    ready = [i for i, node in enumerate(nodes) if waiting[node] == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        order.append(node)
        for user in node.users:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, position[user])
    if len(order) != len(nodes):
        raise ValueError("the graph has a cycle")
    for before, after in itertools.pairwise(order):
        if before.next is not after:
            before.append(after)
