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
    if form is None or not groups:
        found = _evaluated(mask)
        require(found is not None, "", mask)
        assert found is not None
        return found
    sizes = f"{t} queries and {s} keys are not known to be the same positions"
    require(type(t) is int and type(s) is int and t == s, sizes, mask)
    require(len(groups) == 1, "the mask has groups of two kinds", mask)
    found = _grid(groups[0], t)
    values = "the groups of the mask are not rows or columns of positions counted from 0"
    require(found is not None, values, mask)
    assert found is not None
    uneven = f"{t} positions are not whole rows of {found.width}"
    require(found.width < t and t % found.width == 0, uneven, mask)
    rest = [term for term in form.terms if term is not groups[0]]
    also = f"the mask is more than {'columns' if found.are_columns else 'rows'} of {found.width}"
    require(rest in ([], [_CAUSAL]), f"{also}: only causality is kept within them", mask)
    return Lines(found.width, t, found.are_columns, bool(rest))


_CAUSAL = masks.Band(high=whole(0))


def _grid(groups: masks.Groups, t: int) -> Lines | None:
    widths = {atom.by for atom, _ in groups.query.terms if isinstance(atom, Quotient)}
    for width in widths:
        for are_columns in (False, True):
            lines = [_line(axis, t, width, are_columns) for axis in ("query", "key")]
            if [groups.query, groups.key] == lines:
                return Lines(width, t, are_columns)
    return None


def _line(axis: str, t: int, width: int, is_column: bool) -> Sum:
    at = of(Axis(axis, t))
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
