"""Which parts of a flat graph are the layers of a model: residual streams and their steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Graph, Node


@dataclass(frozen=True)
class Layer:
    """One layer: `exit` is the residual stream out of it, of the shape of `entry`."""

    path: str
    entry: Node
    exit: Node
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Stack:
    """Layers in a chain: the exit of each is the entry of the next."""

    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Stacks:
    """The stacks of a graph, in graph order, and why other places are none."""

    found: tuple[Stack, ...] = ()
    refused: tuple[tuple[Node, str], ...] = ()

    def __iter__(self) -> Iterator[Stack]:
        return iter(self.found)


def stacks(graph: Graph) -> Stacks:
    """Find the stacks of layers of a graph."""
    return Stacks()
