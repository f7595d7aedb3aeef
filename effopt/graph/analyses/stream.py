"""Along which values a residual stream runs, and where a graph can be cut on it.

A residual stream is a value that layers add to: `x -> x + attention(norm(x)) -> ... `, or, with the
norm after the addition, `norm(x + attention(x))`. Its cuts are the values through which everything of
the stream passes: between two cuts lies a part of the model that reads the stream and gives it back,
so that the part can be left out by reading the earlier cut for the later one.

A sum of two equals in shape is followed through both operands, so whatever by-passes a value (a skip
connection, a second stream) takes that value's cut away: what is found is proved, and what is not a
chain is not found. Values beside the stream, such as masks, keys
and values, and routing scores, may pass. Linear in nodes for each stream; assumes the program's
order, and finds fewer cuts in any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from effopt.graph.values import is_floating, shape_of

_aten = torch.ops.aten
_SUMS = frozenset({_aten.add.Tensor, _aten.sub.Tensor})
_THROUGH = frozenset(
    {
        _aten.add.Scalar,
        _aten.mul.Scalar,
        _aten.div.Scalar,
        _aten.layer_norm.default,
        _aten.rms_norm.default,
        _aten.group_norm.default,
        _aten.batch_norm.default,
        _aten.dropout.default,
        _aten.feature_dropout.default,
        _aten.relu.default,
        _aten.clamp.default,
        _aten._to_copy.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.alias.default,
        _aten.view.default,
        _aten.reshape.default,
        _aten._unsafe_view.default,
        _aten.transpose.int,
        _aten.permute.default,
        _aten.squeeze.dim,
        _aten.unsqueeze.default,
        torch.ops.effopt.rms_norm.default,
    }
)
"""Calls whose result is their first operand, scaled, normed, rounded or laid out anew."""

_SOURCES = 8
"""How many of the values that a stream may begin at are tried."""


class Ancestry:
    """The order of a graph's nodes, and which of them each one is computed from."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = tuple(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self._above: list[int] = []
        for node in self.nodes:
            bits = 0
            for operand in node.all_input_nodes:
                at = self.position[operand]
                bits |= self._above[at] | (1 << at)
            self._above.append(bits)

    def depends(self, node: Node, on: Node) -> bool:
        """Whether `node` is computed from `on`, or is it."""
        return node is on or bool(self._above[self.position[node]] >> self.position[on] & 1)

    def mask(self, nodes: Iterable[Node]) -> int:
        """A set of nodes, for `depends_on_any`."""
        return sum(1 << self.position[node] for node in nodes)

    def depends_on_any(self, node: Node, mask: int) -> bool:
        """Whether `node` is computed from some other node of a set."""
        return bool(self._above[self.position[node]] & mask)

    def between(self, start: Node, end: Node) -> tuple[Node, ...]:
        """The nodes on the paths from `start` to `end`, in order: `end` is one, `start` is not."""
        first, last = self.position[start], self.position[end]
        above = self._above[last] | (1 << last)
        inside = self.nodes[first + 1 : last + 1]
        return tuple(
            node
            for at, node in enumerate(inside, first + 1)
            if above >> at & 1 and self._above[at] >> first & 1
        )

    def meet(self, a: Node, b: Node) -> bool:
        """Whether something, other than the graph's output, is computed from both."""
        return any(
            self.depends(node, a) and self.depends(node, b) for node in self.nodes if node.op != "output"
        )


@dataclass(frozen=True)
class Stream:
    """One residual stream."""

    cuts: tuple[Node, ...]
    """The values through which all of it passes, in order. At least two."""
    members: frozenset[Node]
    """All values that belong to it: sums, their operands, norms of sums, up to what is computed afresh."""


def streams(graph: Graph, ancestry: Ancestry | None = None) -> tuple[Stream, ...]:
    """The residual streams of a graph whose nodes carry `val`, in the order of their ends.

    A stream has two sums at least. One that begins at a value of another, such as a head with layers of
    its own, is a stream by itself.
    """
    ancestry = ancestry or Ancestry(graph)
    sums = _sums_passed(graph)
    ends = [n for n in sums if sums[n] >= 2]
    ends.sort(key=lambda n: (-sums[n], -ancestry.position[n]))
    seen: set[Node] = set()
    found = []
    for end in ends:
        if end in seen:
            continue
        members = _members(end, seen)
        if sum(_is_sum(m) for m in members - seen) < 2:
            continue
        seen |= members
        found.append(Stream(_cuts(end, members, ancestry), frozenset(members)))
    found.sort(key=lambda s: ancestry.position[s.cuts[-1]])
    return tuple(s for s in found if len(s.cuts) > 1)


def continued(node: Node) -> tuple[Node, ...]:
    """The operands that may be the stream which `node` goes on with; none if it is computed afresh."""
    if node.op != "call_function" or not is_floating(node):
        return ()
    operands = [a for a in node.args if isinstance(a, Node) and is_floating(a)]
    if node.target in _SUMS:
        return tuple(dict.fromkeys(a for a in operands if same_form(a, node)))
    if node.target is _aten.mul.Tensor:
        whole = [a for a in operands if same_form(a, node)]
        return tuple(whole) if len(whole) == 1 else ()
    if node.target is _aten.div.Tensor:
        return tuple(operands[:1]) if len(operands) == 1 or not same_form(*operands[:2]) else ()
    return tuple(operands[:1]) if node.target in _THROUGH else ()


def is_residual(node: Node, entry: Node, ancestry: Ancestry) -> bool:
    """Whether `node` adds up two values that are both computed from `entry`, or are it."""
    return _is_sum(node) and all(ancestry.depends(operand, entry) for operand in continued(node))


def same_form(a: Node, b: Node) -> bool:
    """Equal shape; symbolic sizes are equal if their expressions are."""
    return tuple(map(str, shape_of(a))) == tuple(map(str, shape_of(b)))


def _is_sum(node: Node) -> bool:
    return node.target in _SUMS and len(continued(node)) == 2


def _sums_passed(graph: Graph) -> dict[Node, int]:
    """For each node that goes on with a stream, the most sums on a way back along it."""
    passed: dict[Node, int] = {}
    for node in graph.nodes:
        operands = continued(node)
        if operands:
            passed[node] = max(passed.get(a, 0) for a in operands) + (len(operands) == 2)
    return passed


def _members(end: Node, seen: set[Node]) -> set[Node]:
    members: set[Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node not in members:
            members.add(node)
            if node not in seen:
                waiting.extend(continued(node))
    return members


def _cuts(end: Node, members: set[Node], ancestry: Ancestry) -> tuple[Node, ...]:
    """Members that no use of an earlier member passes by, on its way to `end`.

    A member that is computed from no other is a source: where the stream begins, or an operand that
    layers add, such as positions, which may pass until it is in a sum. The stream begins at the source
    with the most cuts.
    """
    mask = ancestry.mask(members)
    in_order = sorted(members, key=ancestry.position.__getitem__)
    source_of: dict[Node, Node] = {}
    for node in in_order:
        before = continued(node)
        if not ancestry.depends_on_any(node, mask):
            source_of[node] = node
        elif len(before) == 1 and before[0] in source_of:
            source_of[node] = source_of[before[0]]
    ends = {
        n: max((ancestry.position[u] for u in n.users if ancestry.depends(end, u)), default=-1)
        for n in members
    }
    best: list[Node] = []
    for start in [n for n in in_order if source_of.get(n) is n][:_SOURCES]:
        cuts = []
        furthest = -1
        for node in in_order:
            if furthest <= ancestry.position[node] and ancestry.depends(node, start):
                cuts.append(node)
            if source_of.get(node, start) is start:
                furthest = max(furthest, ends[node])
        best = max(best, cuts, key=len)
    return tuple(best)
