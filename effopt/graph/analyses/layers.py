"""Which layers a model has: parts of a residual stream that are stacked on each other.

A layer reads the stream, adds to it and gives it back: a graph that reads `entry` wherever it read
`exit` is the model with that layer replaced by the identity. `stream.py` proves where a graph can be
cut so, `borders.py` chooses the borders among the cuts: by the numbered modules of a container, whatever
they are made of, and where there are none by what repeats. Names alone prove nothing, and nothing that
is not proved is a stack.

What a layer gives beside the stream (keys and values, position biases, routing scores) may be read
anywhere. What is left of a layer that was skipped before is no layer.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from effopt.graph import ops
from effopt.graph.analyses import borders
from effopt.graph.analyses.borders import Chain, Numbers, Span
from effopt.graph.analyses.stream import Ancestry, streams
from effopt.graph.provenance import layer_of


@dataclass(frozen=True)
class Layer:
    """One layer: what it reads of the residual stream, and what it makes of it."""

    path: str
    """Module path, `model.layers.3`. For a model without such modules `layer 3`, counted from 0 in graph
    order; `stack 1 layer 3` if there are several stacks without."""
    entry: Node
    exit: Node
    """Of the same shape, dtype and device as `entry`."""
    nodes: tuple[Node, ...]
    """The layer's nodes in graph order, with what it gives beside the stream."""


@dataclass(frozen=True)
class Stack:
    """Layers on each other, two at least: `layers[i].exit` is `layers[i + 1].entry`."""

    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Stacks:
    """The answer for one graph."""

    found: tuple[Stack, ...] = ()
    """In graph order; an encoder and a decoder are two."""
    refused: tuple[tuple[Node, str], ...] = ()
    """What looked like a layer or a stack, and why it is none."""

    def __iter__(self) -> Iterator[Stack]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def stacks(graph: Graph) -> Stacks:
    """The stacks of layers of a graph whose nodes carry `val`. Nothing is changed."""
    ancestry = Ancestry(graph)
    numbers = borders.numbers_of(ancestry.nodes)
    chains: list[Chain] = []
    refused: list[tuple[Node, str]] = []
    for stream in streams(graph, ancestry):
        segments = [Span("", a, b, ancestry.between(a, b)) for a, b in itertools.pairwise(stream.cuts)]
        here, why = borders.chains_of_modules(segments, numbers, ancestry)
        refused += why
        inside = {node for chain in here for span in chain for node in span.nodes}
        for is_taken, rest in itertools.groupby(segments, key=lambda s: s.exit in inside):
            if not is_taken:
                here += borders.chains_by_period(list(rest), ancestry)
        for chain in here:
            readers = list(_read_again(chain, numbers, ancestry))
            refused += readers
            chains += [] if readers else [chain]
    chains.sort(key=lambda chain: ancestry.position[chain[0].entry])
    found = tuple(_stacks(chains, numbers, ancestry))
    taken = {node for stack in found for layer in stack.layers for node in layer.nodes}
    return Stacks(found, tuple((node, reason) for node, reason in refused if node not in taken))


def attention_of(layer: Layer) -> tuple[Node, ...]:
    """The canonical attention nodes of a layer, in graph order."""
    return tuple(n for n in layer.nodes if n.target is ops.attention.overload)


def _read_again(chain: Chain, numbers: Numbers, ancestry: Ancestry) -> Iterator[tuple[Node, str]]:
    """Results of layers that meet the stream again behind the last layer: a ladder, no chain."""
    end = chain[-1].exit
    for i, span in enumerate(chain[:-1]):
        container = span.path.rpartition(".")[0]
        for user in span.exit.users:
            is_left_over = bool(span.path) and container in numbers.get(user, {})
            if user.op == "output" or ancestry.depends(end, user) or is_left_over:
                continue
            if ancestry.meet(user, end):
                name = span.path or f"layer {i}"
                yield user, f"what {name} gives is read again behind the last layer: they are no chain"


def _stacks(chains: Sequence[Chain], numbers: Numbers, ancestry: Ancestry) -> Iterator[Stack]:
    by_module: dict[str, list[Node]] = {}
    for node, numbered in numbers.items():
        for container, number in numbered.items():
            by_module.setdefault(f"{container}.{number}" if container else number, []).append(node)
    unnamed = 0
    several = sum(not _paths(chain) for chain in chains) > 1
    for chain in chains:
        paths = _paths(chain)
        if not paths:
            stack = f"stack {unnamed} " if several else ""
            paths = [f"{stack}layer {i}" for i in range(len(chain))]
            unnamed += 1
        yield Stack(
            tuple(
                Layer(path, s.entry, s.exit, tuple(by_module[path]) if s.path else _all_nodes(s, ancestry))
                for path, s in zip(paths, chain, strict=True)
            )
        )


def _paths(chain: Chain) -> list[str]:
    """The modules that the spans are: known, or each span in one of its own. Empty if there are none."""
    paths = [span.path or _common_path(span) for span in chain]
    nested = any(a == b or a.startswith(f"{b}.") for a, b in itertools.permutations(paths, 2))
    return [] if nested or not all(paths) else paths


def _common_path(span: Span) -> str:
    columns = zip(*(layer_of(node).split(".") for node in span.nodes), strict=False)
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)
    return ".".join(parts[0] for parts in same)


def _all_nodes(span: Span, ancestry: Ancestry) -> tuple[Node, ...]:
    """The nodes of a span and what is computed from them and from no other part of the stream."""
    inside = set(span.nodes)
    waiting = [user for node in span.nodes if node is not span.exit for user in node.users]
    heap = sorted({ancestry.position[user] for user in waiting} - {ancestry.position[n] for n in inside})
    while heap:
        node = ancestry.nodes[heapq.heappop(heap)]
        if node in inside or node.op == "output" or ancestry.depends(node, span.exit):
            continue
        read = [a for a in node.all_input_nodes if ancestry.depends(a, span.entry)]
        if all(a in inside or a is span.entry for a in read):
            inside.add(node)
            for user in node.users:
                heapq.heappush(heap, ancestry.position[user])
    return tuple(sorted(inside, key=ancestry.position.__getitem__))
