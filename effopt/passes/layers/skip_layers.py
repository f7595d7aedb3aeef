"""Skip layers, evenly spaced, or those of a list.

    x1 = layer1(x0);  x2 = layer2(x1);  x3 = layer3(x2)  =>  x1 = layer1(x0);  x3 = layer3(x1)

Lossy; knobs: `keep`, the share of the layers of each stack that stays, or `layers`, those to skip. `keep=1`
changes nothing. Needs no calibration; quality falls steeply without training, which is possible: the
gradients are those of the model without the layers. Saves the layers' operations, weight reads and, with
`effopt.cache_for(model, plan)`, their caches; an ordinary cache is still written.
Source: Liu et al. 2024, arXiv:2404.06954 (skipping spread evenly, equal for all inputs).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph

from effopt.errors import OptionError
from effopt.graph.analyses.layers import Stack
from effopt.graph.bypass import all_but_one, bypass
from effopt.graph.layer_globs import is_named
from effopt.graph.rewrite import PassResult
from effopt.passes.base import Example, Stage, option
from effopt.passes.region import RegionPass


@dataclass(frozen=True)
class SkipLayers(RegionPass):
    """Decides "skip" for the layers that go."""

    name: ClassVar[str] = "skip-layers"
    stage: ClassVar[Stage] = Stage.LAYERS
    conflicts: ClassVar[tuple[str, ...]] = ("drop-layers",)
    alternatives: ClassVar[tuple[str, ...]] = (name,)

    keep: float = option(
        0.75, "share of the layers that stay, the first and the last among them", min=0.01, max=1
    )
    layers: tuple[int, ...] = option(
        (), "positions in the stack of the layers to skip, from 0, instead of `keep`", empty=False
    )
    include: str = option("*", "paths of the layers of the stacks to skip in: globs, `|` between them")

    def decide(self, stack: Stack, scores: Sequence[float] | None, result: PassResult) -> Sequence[Any]:
        """Raises OptionError for a position that the stack does not have, and if nothing would be left."""
        count = len(stack.layers)
        if not all(is_named(layer.path, self.include) for layer in stack.layers):
            paths = f"{stack.layers[0].path} to {stack.layers[-1].path}"
            result.reject(
                self.name, stack.layers[0].exit, f"include={self.include} does not hold all of {paths}"
            )
            return [None] * count
        for position in self.layers:
            if not 0 <= position < count:
                raise OptionError(
                    f"{self.name}: there is no layer {position}: the stack that begins with"
                    f" {stack.layers[0].path} has {count} layers, 0 to {count - 1}"
                )
        if len(set(self.layers)) == count:
            raise OptionError(f"{self.name}: layers={list(self.layers)} would skip all {count} layers")
        kept = set(evenly_spaced(count, self.keep)) if not self.layers else {*range(count)} - {*self.layers}
        return [None if position in kept else "skip" for position in range(count)]

    def choices_in(self, stack: Stack, result: PassResult) -> Sequence[Sequence[Any]]:
        """Each layer that may be skipped, wherever it stands: `keep` is for skipping without measuring."""
        if self.layers or not all(is_named(layer.path, self.include) for layer in stack.layers):
            return super().choices_in(stack, result)
        return [("skip",)] * len(stack.layers)

    def decide_together(self, stack: Stack, asked: Mapping[str, Any], result: PassResult) -> Sequence[Any]:
        """What was asked, if a layer stays."""
        return all_but_one(self.name, stack, asked, result)

    def enact(self, stack: Stack, decisions: Sequence[Any], graph: Graph, result: PassResult) -> None:
        """Read the stream as it was before the layer."""
        bypass(self.name, stack, decisions, graph, result)

    def samples(self) -> Iterable[Example]:
        yield Example(nn.Sequential(*(_Block() for _ in range(8))), (torch.randn(2, 5, 16),))
        yield Example(_without_modules, (torch.randn(2, 16), *(torch.randn(16, 16) for _ in range(8))))

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 16)
        yield Example(_Ladder(), (x,), "what blocks.1 gives is read by blocks.2 and add")
        yield Example(
            nn.Sequential(*(_Block(residual=False) for _ in range(4))), (x,), "no stack of layers was found"
        )
        yield Example(nn.Sequential(_Block(), _Wider(), _Block(32)), (x,), "no stack of layers was found")


def evenly_spaced(count: int, keep: float) -> list[int]:
    """Positions that stay: `i * (count - 1) / (n - 1)` for i below n = `round(keep * count)`, 2 at least."""
    n = max(min(count, 2), round(keep * count))
    return [round(i * (count - 1) / (n - 1)) for i in range(n)] if n > 1 else [0]


class _Block(nn.Module):
    def __init__(self, width: int = 16, residual: bool = True) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(self.norm(x)).relu())
        return x + y if self.residual else y.tanh()


class _Wider(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x + super().forward(x)], -1)


class _Ladder(nn.Module):
    """The last blocks read what the first ones gave."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.blocks[0](x)
        second = self.blocks[1](first)
        third = self.blocks[2](second) + second
        fourth: Tensor = self.blocks[3](third + first)
        return fourth + first


def _without_modules(x: Tensor, *weights: Tensor) -> Tensor:
    for weight in weights:
        x = x + torch.tanh(torch.layer_norm(x, (16,)) @ weight)
    return x
