"""Place positions closer together, so that a model reads more of them than it was trained for.

    cos(position * frequency)  =>  cos(position * (frequency / factor)),  sin likewise

Lossy: `factor` trades resolution of near positions for length; a model that was not trained so loses some
quality, most of it comes back with little training, which the pass allows. Needs no data. All rotations of
all graphs of a model are changed. Costs one division of the frequencies; no other cost changes.
Source: Chen et al. 2023, arXiv:2306.15595, section 2.3 (position interpolation); Pal et al. 2023,
arXiv:2308.10882 (linear scaling).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph.analyses.rotary_tables import RotaryTable
from effopt.graph.rewrite import Emit, require
from effopt.passes.base import Context, Example, Stage, option
from effopt.passes.rotary_tables import RotaryTablePass
from effopt.passes.site import Site


@dataclass(frozen=True)
class ScalePositions(RotaryTablePass):
    """Every rotary table, by one factor."""

    name: ClassVar[str] = "scale-positions"
    stage: ClassVar[Stage] = Stage.ATTENTION

    factor: float = option(2.0, "positions that take the place of one; 1 changes nothing", min=1.0, max=1e6)

    def decide(self, site: Site, context: Context) -> Any:
        """The factor."""
        require(self.factor != 1.0, "factor=1 changes nothing", site.node)
        return {"factor": self.factor}

    def frequencies(self, emit: Emit, table: RotaryTable, decision: Any) -> Node:
        """Those of the table, divided."""
        return emit(torch.ops.aten.div.Tensor, table.frequencies, float(decision["factor"]))

    def samples(self) -> Iterable[Example]:
        x, frequencies = torch.randn(2, 3, 5, 8), 100.0 ** (-torch.arange(4) / 4)
        yield Example(rotated, (x, frequencies))

    def refusals(self) -> Iterable[Example]:
        x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 8)
        yield Example(turn, (x, angle.cos(), angle.sin()), "the table is made outside")
        yield Example(lambda x, a: turn(x, a.cos(), a.sin()), (x, angle), "the table is made outside")
        yield Example(lambda x, a: turn(x, a.cos(), (a + 1).sin()), (x, angle), "is made outside")


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation by halves."""
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat((-other, one), -1) * sin


def rotated(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotated by the index along the last dimension but one."""
    angle = torch.arange(x.shape[-2])[:, None].float() * frequencies
    angle = torch.cat((angle, angle), -1)
    return turn(x, angle.cos(), angle.sin())
