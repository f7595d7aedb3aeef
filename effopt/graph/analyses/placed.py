"""Tensors of which it is known where their elements are read. Looks only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.masks.moves import Place
from effopt.graph.analyses.masks.sums import Axis, Quotient, Sum
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of


@dataclass(frozen=True)
class Placed:
    """A tensor, and the place in it that is read for one place of axes with names."""

    node: Node
    at: Place

    def require_plain(self, axes: Collection[str], what: str) -> None:
        """Raise `Reject` unless along each dimension there is one index, or one axis in order.

        An axis may be read in groups: element `i // n`, for repeated heads.
        """
        seen = set[str]()
        for size, at in zip(shape_of(self.node), self.at, strict=True):
            axis, repeats = axis_of(at)
            fits = axis is not None and axis.name in axes and axis.name not in seen
            fits = fits and statically_known_true(size * repeats == axis.size)  # type: ignore[union-attr]
            words = f"{what}, {self.node.name}, is read at other places than one for each of its elements"
            require(fits or at.number is not None, words, self.node)
            seen.add(axis.name if axis is not None else "")


def axis_of(at: Sum) -> tuple[Axis | None, int]:
    """The axis that a place is, and how often each of its elements is read; None if it is none."""
    atom: Any = at.only
    repeats = 1
    if isinstance(atom, Quotient):
        atom, repeats = atom.of.only, atom.by
    return (atom, repeats) if isinstance(atom, Axis) else (None, 1)
