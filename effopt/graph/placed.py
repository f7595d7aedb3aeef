"""Tensors of which it is known where their elements are read, and laying them out by axes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import mask_sums
from effopt.graph.analyses.masks.moves import Place
from effopt.graph.analyses.masks.sums import Axis, Quotient, Sum, of
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import shape_of

_aten = torch.ops.aten


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
            axis, repeats = _axis_of(at)
            fits = axis is not None and axis.name in axes and axis.name not in seen
            fits = fits and statically_known_true(size * repeats == axis.size)  # type: ignore[union-attr]
            words = f"{what}, {self.node.name}, is read at other places than one for each of its elements"
            require(fits or at.number is not None, words, self.node)
            seen.add(axis.name if axis is not None else "")


def _axis_of(at: Sum) -> tuple[Axis | None, int]:
    """The axis that a place is, and how often each of its elements is read; None if it is none."""
    atom: Any = at.only
    repeats = 1
    if isinstance(atom, Quotient):
        atom, repeats = atom.of.only, atom.by
    return (atom, repeats) if isinstance(atom, Axis) else (None, 1)


def laid_out(emit: Emit, placed: Placed, axes: Sequence[str], sizes: Mapping[str, Any]) -> Node:
    """The tensor with just these axes, in full, as `require_plain` allows it to be read.

    Args:
        emit: takes the calls.
        placed: what is laid out.
        axes: the dimensions of the result, in order.
        sizes: of each axis.
    """
    if _is_laid_out(placed, axes, sizes):
        return placed.node
    node, plain = placed.node, list(placed.at)
    for dim in reversed(range(len(plain))):
        axis, repeats = _axis_of(plain[dim])
        if axis is not None and repeats > 1:
            node = emit(_aten.repeat_interleave.self_int, node, repeats, dim)
            plain[dim] = of(axis)
    node = mask_sums.laid_out(emit, node, plain, axes)
    return expanded(emit, node, [sizes[name] for name in axes])


def _is_laid_out(placed: Placed, axes: Sequence[str], sizes: Mapping[str, Any]) -> bool:
    wanted = tuple(of(Axis(axis, sizes[axis])) for axis in axes)
    own = shape_of(placed.node)
    same = [statically_known_true(a == sizes[axis]) for a, axis in zip(own, axes, strict=False)]
    return placed.at == wanted and all(same)


def expanded(emit: Emit, node: Node, sizes: Sequence[Any]) -> Node:
    """A tensor broadcast to `sizes`, as a view; itself if it has them."""
    same = [statically_known_true(a == b) for a, b in zip(shape_of(node), sizes, strict=True)]
    if all(same):
        return node
    return emit(_aten.expand.default, node, [-1 if s else size for s, size in zip(same, sizes, strict=True)])
