"""Turn slow frequencies slower and leave the fastest, so that a model reads more positions than in training.

    frequency[i] = base ** (-2 i / d)  =>  (base * factor ** (d / (d - 2))) ** (-2 i / d)

which is `frequency[i] * factor ** (-i / (d/2 - 1))`: the first stays, the last is divided by `factor`.

Lossy: `factor` trades where far positions lie for length; near ones keep their resolution, so that quality
without training falls less than with `scale-positions`. Needs no data. All rotations of all graphs of a model
are changed. Costs one product of the frequencies; no other cost changes.
Source: Zhu et al. 2024, arXiv:2404.12096 (NTK-aware interpolation).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from effopt.graph.analyses.rotary_tables import RotaryTable, table_of
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import shape_of, val
from effopt.passes.attention.scale_positions import rotated, turn
from effopt.passes.base import Context, Example, Stage, option
from effopt.passes.rotary_tables import RotaryTablePass
from effopt.passes.site import Site

_aten = torch.ops.aten


@dataclass(frozen=True)
class RebasePositions(RotaryTablePass):
    """Every rotary table, as if its base were larger."""

    name: ClassVar[str] = "rebase-positions"
    stage: ClassVar[Stage] = Stage.ATTENTION

    factor: float = option(2.0, "times that the slowest rotation is slower; 1: no change", min=1.0, max=1e6)

    def decide(self, site: Site, context: Context) -> Any:
        """The factor. Which dimension the frequencies lie along must be seen by its size."""
        table = table_of(site.node)
        require(self.factor != 1.0, "factor=1 changes nothing", site.node)
        _dim(table)
        return {"factor": self.factor}

    def frequencies(self, emit: Emit, table: RotaryTable, decision: Any) -> Node:
        """Those of the table, each with its power of the factor."""
        after = len(shape_of(table.frequencies)) - 1 - _dim(table)
        value = val(table.frequencies)
        index = emit(_aten.arange.default, table.half, dtype=value.dtype, device=value.device)
        power = emit(_aten.mul.Tensor, index, -1.0 / (table.half - 1))
        slower = emit(_aten.pow.Scalar, float(decision["factor"]), power)
        slower = emit(_aten.view.default, slower, [table.half, *[1] * after])
        return emit(_aten.mul.Tensor, table.frequencies, slower)

    def samples(self) -> Iterable[Example]:
        x, frequencies = torch.randn(2, 3, 5, 8), 100.0 ** (-torch.arange(4) / 4)
        yield Example(rotated, (x, frequencies))

    def refusals(self) -> Iterable[Example]:
        x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 8)
        yield Example(turn, (x, angle.cos(), angle.sin()), "the table is made outside")

        def repeated(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
            angle = torch.arange(x.shape[-2])[:, None] * frequencies
            return turn(x, angle.cos(), angle.sin())

        yield Example(repeated, (x, torch.rand(8)), "one dimension of 4")


def _dim(table: RotaryTable) -> int:
    """The dimension of the frequencies."""
    sizes = shape_of(table.frequencies)
    found = [i for i, size in enumerate(sizes) if type(size) is int and size == table.half]
    want = f"frequencies {list(sizes)}, and not one dimension of {table.half}, more than 1"
    require(len(found) == 1 and table.half > 1, want, table.product)
    return found[0]
