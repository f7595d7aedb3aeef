"""Drop the layers that change the residual stream least.

    x1 = layer1(x0);  x2 = layer2(x1), with x2 nearly parallel to x1  =>  x1 = layer1(x0);  x2 = x1

Lossy; knob: `keep`, the share of the layers of each stack that stays. Needs calibration: the importance of
a layer is 1 - cos(what it reads, what it gives), by position, meaned over a few batches of real data in
one pass: `plan = effopt.calibrate(model, batches, "drop-layers")`, then `options={"plans": plan}`. Training
afterwards is possible and regains quality. Saves what `skip-layers` saves.
Source: Men et al. 2024, arXiv:2403.03853 (block influence).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph

from effopt.graph.analyses.layers import Stack
from effopt.graph.bypass import all_but_one, bypass
from effopt.graph.rewrite import PassResult
from effopt.passes.base import Example, Stage, option
from effopt.passes.region import RegionPass


@dataclass(frozen=True)
class DropLayers(RegionPass):
    """Decides "drop" for the least important layers, wherever they are."""

    name: ClassVar[str] = "drop-layers"
    stage: ClassVar[Stage] = Stage.LAYERS
    is_scored: ClassVar[bool] = True
    conflicts: ClassVar[tuple[str, ...]] = ("skip-layers",)

    keep: float = option(0.75, "share of the layers of each stack that stays", min=0.01, max=1)

    def score(self, *values: Tensor) -> Tensor:
        """Importance by position, 0 to 2, of what a layer reads and gives, each `[..., d]`."""
        entry, exit_ = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in values)
        return 1 - torch.cosine_similarity(entry, exit_, dim=-1)

    def decide(self, stack: Stack, scores: Sequence[float] | None, result: PassResult) -> Sequence[Any]:
        """`round(keep * count)` layers stay, one at least; of equals the earlier one stays."""
        assert scores is not None, "a scored pass decides on scores"
        count = len(stack.layers)
        by_importance = sorted(range(count), key=lambda position: (-scores[position], position))
        kept = set(by_importance[: max(1, round(self.keep * count))])
        return [None if position in kept else "drop" for position in range(count)]

    def choices_in(self, stack: Stack, result: PassResult) -> Sequence[Sequence[Any]]:
        """Every layer: what measures each of them needs no scores."""
        return [("drop",)] * len(stack.layers)

    def decide_together(self, stack: Stack, asked: Mapping[str, Any], result: PassResult) -> Sequence[Any]:
        """What was asked, if a layer stays."""
        return all_but_one(self.name, stack, asked, result)

    def enact(self, stack: Stack, decisions: Sequence[Any], graph: Graph, result: PassResult) -> None:
        """Read the stream as it was before the layer."""
        bypass(self.name, stack, decisions, graph, result)

    def samples(self) -> Iterable[Example]:
        yield Example(nn.Sequential(*(_Block() for _ in range(4))), (torch.randn(2, 5, 16),))

    def refusals(self) -> Iterable[Example]:
        plain = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))
        yield Example(plain, (torch.randn(2, 5, 16),), "no stack of layers was found")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.norm(x)).relu())
        return x + y
