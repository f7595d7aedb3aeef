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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
    given: Mapping[Node, Any] = MappingProxyType({}),
    smallest: int = 6,
) -> Blocks:
    """Find the repeated blocks of a graph.

    Args:
        graph: any FX graph whose nodes carry `val`.
        barriers: nodes that no block may contain; blocks end before and begin after them.
        marked: nodes that differ from the others in a way the graph does not show, such as carrying
            a gradient; a marked node is never equal to an unmarked one.
        given: calls that are as good as inputs, with what two of them must share to be equal operands: no
            block contains one, and none is cut by one.
        smallest: fewest nodes of a block.
    """
    nodes = [n for n in graph.nodes if n.op in ("call_function", "call_method") and n not in given]
    tokens = [None if n in barriers else _token(n, marked, given) for n in nodes]
    ids: dict[Any, int] = {}
    sequence = [-1 - i if t is None else ids.setdefault(t, len(ids)) for i, t in enumerate(tokens)]
    runs: list[Run] = []
    spans = [(0, len(nodes))]
    while spans:
        start, stop = spans.pop()
        found = _best_run(nodes, sequence, start, stop, smallest)
        if found is None:
            continue
        first, period, length, count = found
        starts = [first + k * period for k in range(count)]
        runs.append(Run(tuple(tuple(nodes[s : s + length]) for s in starts)))
        ends = [start, *(s + length for s in starts)]
        spans += list(zip(ends, [*starts, stop], strict=True))
    return Blocks(tuple(sorted(runs, key=lambda r: -r.saved_nodes)))


def _token(node: Node, marked: frozenset[Node], given: Mapping[Node, Any]) -> Any:
    """What two nodes must share to be the same step of two copies of a block."""

    def describe(value: Any) -> Any:
        if isinstance(value, Node) and value in given:
            return ("given", given[value])
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
) -> tuple[int, int, int, int] | None:
    """(first position, distance between copies, length, count) of the run that saves most, or None."""
    best: tuple[int, int, int, int] | None = None
    most = 0.0
    position = {n: i for i, n in enumerate(nodes)}
    for period in _periods(sequence, start, stop, smallest):
        for low, high in _matching_stretches(sequence, period, start, stop):
            length = min(period, high - low)
            count = _copies(sequence, low, high, period, stop)
            if length < smallest or _worth(length, count) <= most:
                continue
            spare = high - low + period - count * period if high - low >= period else 0
            proved = _place(nodes, position, low, spare, period, length, count)
            if proved is not None and _worth(length, proved[3]) > most:
                best, most = proved, _worth(length, proved[3])
    return best


def _worth(length: int, count: int) -> float:
    """Nodes saved, less half of the block: of two equal savings, the smaller block leaves more to find."""
    return (count - 1.5) * length


def _copies(sequence: Sequence[int], low: int, high: int, period: int, stop: int) -> int:
    """How often the stretch repeats: as a tandem, or, if barriers cut it, at the same distance."""
    if high - low >= period:
        return (high - low) // period + 1
    count = 2
    while high + (count - 1) * period <= stop - period and all(
        sequence[i + (count - 1) * period] == sequence[i + count * period] for i in range(low, high)
    ):
        count += 1
    return count


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
    rare = Counter(len(v) for v in by_token.values() if len(v) > 1)
    for positions in by_token.values():
        if 1 < len(positions) <= 64 and rare[len(positions)] >= smallest // 2:
            for step in (2, 3, 4):
                for a, b in zip(positions, positions[step:], strict=False):
                    distances[b - a] += 1
    return [p for p, _ in distances.most_common(_CANDIDATE_PERIODS)]


def _matching_stretches(
    sequence: Sequence[int], period: int, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Maximal [low, high) with `sequence[i] == sequence[i + period]`."""
    low = start
    for i in range(start, stop - period + 1):
        if i == stop - period or sequence[i] != sequence[i + period]:
            if i > low:
                yield low, i
            low = i + 1


def _place(
    nodes: Sequence[Node],
    position: dict[Node, int],
    low: int,
    spare: int,
    period: int,
    length: int,
    count: int,
) -> tuple[int, int, int, int] | None:
    """The start, among the possible ones, with the fewest values carried over; then the proof.

    A value of several results and the calls that take them apart stay together: only tensors and
    sizes can be passed to a block or returned by it.
    """
    if spare or length == period:
        ways = [(low + shift, length) for shift in range(spare + 1)]
        ways.sort(key=lambda way: _carried(nodes, position, way[0], period))
    else:
        ways = [(low + a, length - a - b) for a in range(3) for b in range(3) if length - a - b > 0]
    whole = [w for w in ways if not _splits_results(nodes, position, w[0], period, w[1], count)]
    for first, size in whole[:4]:
        equal = _isomorphic_prefix(nodes, position, first, period, size, count)
        if equal >= 2:
            return first, period, size, equal
    return None


def _splits_results(
    nodes: Sequence[Node], position: dict[Node, int], first: int, period: int, length: int, count: int
) -> bool:
    for start in range(first, first + count * period, period):
        for node in nodes[start : start + length]:
            related = [*node.users] if isinstance(val(node), (tuple, list)) else []
            related += [a for a in node.all_input_nodes if isinstance(val(a), (tuple, list))]
            if any(not start <= position.get(other, -1) < start + length for other in related):
                return True
    return False


def _carried(nodes: Sequence[Node], position: dict[Node, int], cut: int, period: int) -> int:
    """Values made in the period before `cut` and read in the one after it, and beyond."""
    return sum(
        any(position.get(user, -1) >= cut for user in nodes[i].users)
        for i in range(max(0, cut - period), cut)
    )


def _isomorphic_prefix(
    nodes: Sequence[Node], position: dict[Node, int], first: int, period: int, length: int, count: int
) -> int:
    """How many of the copies, from the first on, have the operand structure of the first."""
    model = _structure(nodes, position, first, length)
    for k in range(1, count):
        if _structure(nodes, position, first + k * period, length) != model:
            return k
    return count


def _structure(nodes: Sequence[Node], position: dict[Node, int], first: int, length: int) -> list[Any]:
    """For each node of an interval, for each operand: its offset inside, or that it comes from outside."""

    def locate(node: Node) -> int:
        offset = position.get(node, -1) - first
        return offset if 0 <= offset < length else -1

    return [[locate(a) for a in operands(nodes[first + i])] for i in range(length)]


def operands(node: Node) -> list[Node]:
    """Every node operand of a call, in order, repeats kept."""
    found: list[Node] = []

    def look(value: Any) -> Any:
        if isinstance(value, Node):
            found.append(value)
        return value

    map_aggregate((node.args, node.kwargs), look)
    return found


def operand_groups(run: Run) -> list[list[tuple[int, int]]]:
    """What the copies read from outside, each value as the slots (node offset, operand offset) it fills.

    Slots that hold one node in every copy are one input.
    """
    groups: dict[tuple[Node, ...], list[tuple[int, int]]] = {}
    inside = [set(instance) for instance in run.instances]
    every = [[operands(n) for n in instance] for instance in run.instances]
    for i, node_operands in enumerate(every[0]):
        for j, operand in enumerate(node_operands):
            if operand not in inside[0]:
                groups.setdefault(tuple(copy[i][j] for copy in every), []).append((i, j))
    return list(groups.values())


def results(run: Run) -> list[int]:
    """Offsets of the nodes that something outside their copy reads, in any of the copies."""
    offsets: set[int] = set()
    for instance in run.instances:
        inside = set(instance)
        offsets.update(i for i, node in enumerate(instance) if any(user not in inside for user in node.users))
    return sorted(offsets)
