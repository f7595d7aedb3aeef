"""Let adjacent layers read the keys and values of the first of them.

    k0, v0 = project(x0);  y0 = attention(q0, k0, v0);  k1, v1 = project(x1);  y1 = attention(q1, k1, v1)
      =>  k0, v0 = project(x0);  y0 = attention(q0, k0, v0);                     y1 = attention(q1, k0, v0)

Lossy; knobs: `group`, how many layers share, and `include`, which ones may. Needs no calibration; quality
usually needs training with it, which is possible: gradients go through as in the model so written.
Saves the projections and the cache of the later layers: at `group=2`, half of the cache's bytes if it is
made by `effopt.cache_for(model, plan)`. An ordinary cache still holds a copy; a static one is not written.
Source: Brandon et al. 2024, arXiv:2405.12981, section 2 (cross-layer attention).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.nn import functional as F

from effopt.graph.analyses.layers import Stack
from effopt.graph.analyses.shared_keys import reading
from effopt.graph.layer_globs import is_named
from effopt.graph.rewrite import PassResult, Reject
from effopt.passes.base import Example, Stage, option
from effopt.passes.region import RegionPass


@dataclass(frozen=True)
class ShareKVAcrossLayers(RegionPass):
    """Decides for each later layer of a group the position of the layer whose keys it reads."""

    name: ClassVar[str] = "share-kv-across-layers"
    alternatives: ClassVar[tuple[str, ...]] = (name,)
    stage: ClassVar[Stage] = Stage.KV
    requires: ClassVar[tuple[str, ...]] = ("recognize-attention",)
    # Each layer may make its mask anew: it is the same one if it is the same node.
    after: ClassVar[tuple[str, ...]] = ("eliminate-common-subexpressions",)

    group: int = option(2, "how many adjacent layers read the keys and values of the first of them", min=1)
    include: str = option("*", "paths of the layers that may share: globs, `|` between them")

    def decide(self, stack: Stack, scores: Sequence[float] | None, result: PassResult) -> Sequence[Any]:
        """Whole groups that can share; a group that cannot is left, with the reason."""
        decisions: list[int | None] = [None] * len(stack.layers)
        for first, *rest in self._groups(stack, result):
            try:
                for later in rest:
                    reading(stack, later, first)
            except Reject as why:
                members = ", ".join(stack.layers[i].path for i in (first, *rest))
                result.reject(
                    self.name, why.node or stack.layers[first].exit, f"{members} share nothing: {why}"
                )
            else:
                decisions[rest[0] : rest[-1] + 1] = [first] * len(rest)
        return decisions

    def _groups(self, stack: Stack, result: PassResult) -> Iterator[range]:
        """Positions of the layers that are to share, `group` at a time, among neighbours that may."""
        may = [is_named(layer.path, self.include) for layer in stack.layers]
        if not any(may):
            paths = f"{stack.layers[0].path} to {stack.layers[-1].path}"
            result.reject(self.name, stack.layers[0].exit, f"include={self.include} is none of {paths}")
        for is_one, run in groupby(range(len(may)), key=may.__getitem__):
            positions = list(run)
            for start in range(positions[0], positions[-1] + 1, self.group) if is_one else ():
                members = range(start, min(start + self.group, positions[-1] + 1))
                if len(members) > 1:
                    yield members

    def choices_in(self, stack: Stack, result: PassResult) -> Sequence[Sequence[Any]]:
        """For each later layer of a group that can share, the path of the layer whose keys it reads."""
        decisions = self.decide(stack, None, result)
        return [() if first is None else (stack.layers[first].path,) for first in decisions]

    def decide_together(self, stack: Stack, asked: Mapping[str, Any], result: PassResult) -> Sequence[Any]:
        """Positions of the layers that are still there; a layer whose keys are gone keeps its own."""
        positions = {layer.path: position for position, layer in enumerate(stack.layers)}
        decisions: list[int | None] = [None] * len(stack.layers)
        for later, layer in enumerate(stack.layers):
            first = positions.get(asked.get(layer.path, ""))
            if first is not None:
                # Whoever reads another layer's keys has none of its own to read.
                own = decisions[first]
                first = first if own is None else own
                try:
                    reading(stack, later, first)
                except Reject as why:
                    result.reject(self.name, why.node or layer.exit, f"{layer.path} shares nothing: {why}")
                else:
                    decisions[later] = first
        return decisions

    def enact(self, stack: Stack, decisions: Sequence[Any], graph: Graph, result: PassResult) -> None:
        """Redirect the attentions' operands and the graph's outputs; the projections are then dead code."""
        shared = [(i, reading(stack, i, first)) for i, first in enumerate(decisions) if first is not None]
        output = graph.output_node()
        returned = list(output.args[0])  # type: ignore[arg-type]
        for index, edits in shared:
            note = f"reads the keys and values of {stack.layers[decisions[index]].path}"
            for attention, (key, value) in edits.operands.items():
                if attention.args[1:3] != (key, value):
                    attention.args = (attention.args[0], key, value, *attention.args[3:])
                    result.apply(self.name, "attention", attention, note)
            for position, node in edits.outputs.items():
                returned[position] = node
        output.args = (tuple(returned),)

    def samples(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 16)
        yield Example(nn.Sequential(*(_Layer() for _ in range(4))), (x,))
        yield Example(nn.Sequential(*(_Layer(heads=1, window=3) for _ in range(5))), (x,))

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 16)
        for other, reason in (
            (_Layer(heads=1), "its keys are [2, 1, 5, 4], those of 0 [2, 2, 5, 4]"),
            (_Layer(window=3), "its mask is not that of 0"),
            (_Layer(attends=False), "1 holds no attention that was recognised"),
            (_Layer(scale=2.0), "its keys are not computed as those of 0"),
        ):
            yield Example(nn.Sequential(_Layer(), other), (x,), reason)


class _Layer(nn.Module):
    """Four query heads on 16 features, `heads` of keys; each query sees itself and what is before it."""

    def __init__(self, heads: int = 2, window: int = 9, scale: float = 1.0, attends: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * heads), nn.Linear(16, 4 * heads)
        self.window, self.scale, self.attends = window, scale, attends

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if not self.attends:
            return x + self.q(x).tanh()
        near = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(1 - self.window)
        y = F.scaled_dot_product_attention(q, k.cos() * self.scale, v, near, enable_gqa=True)
        return x + y.transpose(1, 2).flatten(2)
