"""Which parts of a flat graph are one block, repeated.

A model written as a loop over layers is captured in program order, so its equal layers are a run of
equal intervals in the node sequence. The search finds the period of such runs from the distances
between equal nodes, and then proves, operand by operand, that the intervals are isomorphic. Module
names are not looked at: a model without submodules is found as well. Cost is linear in nodes times
the few candidate periods. Assumes that node order is the program's; a reordered graph is still
answered correctly, only with fewer blocks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from effopt.graph.values import val

_CANDIDATE_PERIODS = 12


@dataclass(frozen=True)
class Run:
    """`instances[k]` is the k-th copy of one block: its nodes in order. All copies are isomorphic."""

    instances: tuple[tuple[Node, ...], ...]

    @property
    def saved_nodes(self) -> int:
        """How many nodes need no compilation of their own."""
        return (len(self.instances) - 1) * len(self.instances[0])


@dataclass(frozen=True)
class Blocks:
    """The disjoint runs of a graph, the one that saves most first."""

    runs: tuple[Run, ...]


def blocks(
    graph: Graph,
    barriers: frozenset[Node] = frozenset(),
    marked: frozenset[Node] = frozenset(),
    smallest: int = 6,
) -> Blocks:
    """Find the repeated blocks of a graph.

    Args:
        graph: any FX graph whose nodes carry `val`.
        barriers: nodes that no block may contain; blocks end before and begin after them.
        marked: nodes that differ from the others in a way the graph does not show, such as carrying
            a gradient; a marked node is never equal to an unmarked one.
        smallest: fewest nodes of a block.
    """
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    tokens = [None if n in barriers else _token(n, marked) for n in nodes]
    ids: dict[Any, int] = {}
    sequence = [-1 - i if t is None else ids.setdefault(t, len(ids)) for i, t in enumerate(tokens)]
    runs: list[Run] = []
    spans = [(0, len(nodes))]
    while spans:
        start, stop = spans.pop()
        found = _best_run(nodes, sequence, start, stop, smallest)
        if found is None:
            continue
        first, period, count = found
        runs.append(Run(tuple(tuple(nodes[first + k * period : first + (k + 1) * period]) for k in range(count))))
        spans += [(start, first), (first + period * count, stop)]
    return Blocks(tuple(sorted(runs, key=lambda r: -r.saved_nodes)))


def _token(node: Node, marked: frozenset[Node]) -> Any:
    """What two nodes must share to be the same step of two copies of a block."""

    def describe(value: Any) -> Any:
        return ("node", _signature(val(value)), value in marked) if isinstance(value, Node) else value

    arguments = map_aggregate((node.args, tuple(sorted(node.kwargs.items()))), describe)
    return (node.target, repr(arguments), repr(_signature(val(node))), node in marked)


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    return str(value)


def _best_run(
    nodes: Sequence[Node], sequence: Sequence[int], start: int, stop: int, smallest: int
) -> tuple[int, int, int] | None:
    """(first position, period, count) of the run that saves most, or None."""
    best: tuple[int, tuple[int, int, int]] | None = None
    for period in _periods(sequence, start, stop, smallest):
        for low, high in _matching_stretches(sequence, period, start, stop):
            count = (high - low) // period + 1
            saved = (count - 1) * period
            if count < 2 or (best is not None and saved <= best[0]):
                continue
            spare = (high - low) + period - count * period
            proved = _place(nodes, low, spare, period, count)
            if proved is not None and (best is None or (proved[2] - 1) * period > best[0]):
                best = ((proved[2] - 1) * period, proved)
    return best[1] if best is not None else None


def _periods(sequence: Sequence[int], start: int, stop: int, smallest: int) -> list[int]:
    """Likely periods: the commonest distances between equal neighbours in the token sequence."""
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for position in range(start, stop):
        token = sequence[position]
        if token in last and position - last[token] >= smallest:
            distances[position - last[token]] += 1
        last[token] = position
    # A token that occurs twice in a block shows only parts of the period: try the sums as well.
    by_token: dict[int, list[int]] = defaultdict(list)
    for position in range(start, stop):
        by_token[sequence[position]].append(position)
    rare = Counter(len(v) for v in by_token.values() if 1 < len(v))
    for positions in by_token.values():
        if 1 < len(positions) <= 64 and rare[len(positions)] >= smallest // 2:
            for step in (2, 3, 4):
                for a, b in zip(positions, positions[step:], strict=False):
                    distances[b - a] += 1
    return [p for p, _ in distances.most_common(_CANDIDATE_PERIODS)]


def _matching_stretches(
    sequence: Sequence[int], period: int, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Maximal [low, high) with `sequence[i] == sequence[i + period]`, at least one period long."""
    low = start
    for i in range(start, stop - period + 1):
        if i == stop - period or sequence[i] != sequence[i + period]:
            if i - low >= period:
                yield low, i
            low = i + 1


def _place(
    nodes: Sequence[Node], low: int, spare: int, period: int, count: int
) -> tuple[int, int, int] | None:
    """The start, among the possible ones, with the fewest values carried over; then the proof."""
    position = {n: i for i, n in enumerate(nodes)}
    offsets = sorted(range(spare + 1), key=lambda s: _carried(nodes, position, low + s, period))
    for shift in offsets[:4]:
        equal = _isomorphic_prefix(nodes, position, low + shift, period, count)
        if equal >= 2:
            return low + shift, period, equal
    return None


def _carried(nodes: Sequence[Node], position: dict[Node, int], cut: int, period: int) -> int:
    """Values made in the period before `cut` and read in the one after it, and beyond."""
    return sum(
        any(position.get(user, -1) >= cut for user in nodes[i].users) for i in range(max(0, cut - period), cut)
    )


def _isomorphic_prefix(
    nodes: Sequence[Node], position: dict[Node, int], first: int, period: int, count: int
) -> int:
    """How many of the copies, from the first on, have the operand structure of the first."""
    model = _structure(nodes, position, first, period)
    for k in range(1, count):
        if _structure(nodes, position, first + k * period, period) != model:
            return k
    return count


def _structure(nodes: Sequence[Node], position: dict[Node, int], first: int, period: int) -> list[Any]:
    """For each node of an interval, for each operand: its offset inside, or that it comes from outside."""

    def locate(node: Node) -> int:
        offset = position.get(node, -1) - first
        return offset if 0 <= offset < period else -1

    return [[locate(a) for a in operands(nodes[first + i])] for i in range(period)]


def operands(node: Node) -> list[Node]:
    """Every node operand of a call, in order, repeats kept."""
    found: list[Node] = []

    def look(value: Any) -> Any:
        if isinstance(value, Node):
            found.append(value)
        return value

    map_aggregate((node.args, node.kwargs), look)
    return found
