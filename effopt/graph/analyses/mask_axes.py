"""Whether a mask lets positions of a grid see just those of their own row, or of their own column.

Positions 0 .. t-1 are a grid of `t / width` rows: position i lies in row `i // width`, column `i % width`.

    key // width == query // width   =>  rows          key % width == query % width   =>  columns

The mask is read (`analyses.masks`), or evaluated where it depends on no input. Looks only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph.analyses import masks
from effopt.graph.analyses.masks.sums import Axis, Quotient, Sum, of, quotient, whole
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of, val


@dataclass(frozen=True)
class Lines:
    """The rows, or the columns, of a grid of `t` positions."""

    width: int
    """Columns of the grid."""
    t: int
    are_columns: bool = False
    is_causal: bool = False
    """Within a line, no position sees a later one."""

    @property
    def length(self) -> int:
        """Positions of one line."""
        return self.t // self.width if self.are_columns else self.width

    def mask(self) -> Tensor:
        """Which keys a query sees: bool `[t, t]`."""
        at = torch.arange(self.t)
        line = at % self.width if self.are_columns else at // self.width
        seen = line == line[:, None]
        return seen & (at <= at[:, None]) if self.is_causal else seen


def lines_of(mask: Node, t: Any, s: Any) -> Lines:
    """The lines that a mask, or a bias that only hides, divides queries and keys into. Raises `Reject`."""
    form = masks.opening(mask)
    groups = [term for term in form.terms if isinstance(term, masks.Groups)] if form else []
    found = _grid(groups[0]) if len(groups) == 1 else None
    if form is None or found is None:
        known = _evaluated(mask)
        require(len(groups) < 2 or known is not None, "the mask has groups of two kinds", mask)
        values = "the groups of the mask are not rows or columns of positions counted from 0"
        require(known is not None, values if groups else "", mask)
        assert known is not None
        return known
    width, are_columns = found
    sizes = f"{t} queries and {s} keys are not known to be the same positions"
    require(type(t) is int and type(s) is int and t == s, sizes, mask)
    require(width < t and t % width == 0, f"{t} positions are not whole rows of {width}", mask)
    rest = [term for term in form.terms if term is not groups[0]]
    also = f"the mask is more than {'columns' if are_columns else 'rows'} of {width}"
    require(rest in ([], [_CAUSAL]), f"{also}: only causality is kept within them", mask)
    return Lines(width, t, are_columns, bool(rest))


_CAUSAL = masks.Band(high=whole(0))


def _grid(groups: masks.Groups) -> tuple[int, bool] | None:
    """Columns of the grid, and whether its lines are those."""
    widths = {atom.by for atom, _ in groups.query.terms if isinstance(atom, Quotient)}
    for width in widths:
        for are_columns in (False, True):
            lines = [_line(axis, width, are_columns) for axis in ("query", "key")]
            if [groups.query, groups.key] in (lines, [line * -1 for line in lines]):
                return width, are_columns
    return None


def _line(axis: str, width: int, is_column: bool) -> Sum:
    at = of(Axis(axis, 2))  # of any size but 1: it is not compared
    return at - quotient(at, width) * width if is_column else quotient(at, width)


def _evaluated(mask: Node) -> Lines | None:
    """Of a mask that depends on no input: the lines that the first and the last query say, if all agree."""
    sizes = shape_of(mask)
    if len(sizes) < 2 or sizes[-1] != sizes[-2] or type(sizes[-1]) is not int or sizes[-1] < 4:
        return None
    known, t = masks.evaluate(mask), sizes[-1]
    if known is None:
        return None
    seen = known if val(mask).dtype == torch.bool else known == 0
    hidden = ~seen if val(mask).dtype == torch.bool else known <= masks.MASKED
    last = seen.reshape(-1, t, t)[0, -1].nonzero().flatten().tolist()
    if not 1 < len(last) < t or not bool((seen | hidden).all()):
        return None
    step, is_causal = last[1] - last[0], not bool(seen.reshape(-1, t, t)[0, 0, 1:].any())
    lines = Lines(len(last) if step == 1 else step, t, step != 1, is_causal)
    whole_rows = lines.width > 1 and t % lines.width == 0
    return lines if whole_rows and bool((seen == lines.mask()).all()) else None
