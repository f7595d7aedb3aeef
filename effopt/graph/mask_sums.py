"""Writes what was read of a mask as nodes again: sums of indices, sizes and elements of tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.masks.conditions import Origin
from effopt.graph.analyses.masks.forms import AXES
from effopt.graph.analyses.masks.sums import Element, Quotient, Sum
from effopt.graph.rewrite import Emit
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten


def bound_of(emit: Emit, s: Sum) -> Any:
    """A sum of sizes and numbers, as one of them."""
    total: Any = s.constant
    for atom, by in s.terms:
        node = atom.node  # type: ignore[union-attr]
        node = node if by == 1 else emit(operator.mul, node, by)
        total = node if total == 0 else emit(operator.add, node, total)
    return total


def joined(emit: Emit, origins: Sequence[Origin], op: Any, rank: int) -> Node | None:
    """Conditions or terms, each by the last `rank` of (batch, head, query, key), joined by `op`."""
    total: Node | None = None
    for origin in origins:
        node = laid_out(emit, origin.node, origin.at, AXES[4 - rank :])
        total = node if total is None else emit(op, total, node)
    return total


def laid_out(emit: Emit, node: Node, at: Sequence[Sum], names: Sequence[str]) -> Node:
    """A node whose dimensions are numbers or axes, with one for each of `names`, of length 1 if it is new."""
    sizes = shape_of(node)
    ordered = len(at) == len(names) and all(
        getattr(s.only, "name", "") == name or (s.number == 0 and statically_known_true(size == 1))
        for s, name, size in zip(at, names, sizes, strict=True)
    )
    if ordered:
        return node
    axes: list[str] = []
    for dim in reversed(range(len(at))):
        if at[dim].number is not None:
            node = emit(_aten.select.int, node, dim, at[dim].constant)
        else:
            axes.insert(0, at[dim].only.name)  # type: ignore[union-attr]
    wanted = [axes.index(n) for n in names if n in axes]
    if wanted != sorted(wanted):
        node = emit(_aten.permute.default, node, wanted)
    for dim, name in enumerate(names):
        if name not in axes:
            node = emit(_aten.unsqueeze.default, node, dim)
    return node


def numbers(emit: Emit, s: Sum, axis: str, along: Node) -> Node:
    """A sum over one axis and, perhaps, the batch, as integers `[b, n]` or `[1, n]`."""
    total: Node | None = None
    for atom, by in sorted(s.terms, key=lambda term: repr(term[0])):
        node = _number(emit, atom, axis, along)
        node = node if by == 1 else emit(_aten.mul.Tensor, node, by)
        total = node if total is None else emit(_aten.add.Tensor, total, node)
    assert total is not None
    return emit(_aten.add.Tensor, total, s.constant) if s.constant else total


def _number(emit: Emit, atom: Any, axis: str, along: Node) -> Node:
    if isinstance(atom, Quotient):
        return emit(_aten.floor_divide.default, numbers(emit, atom.of, axis, along), atom.by)
    if isinstance(atom, Element):
        return laid_out(emit, atom.node, atom.at, ("batch", axis))
    n = shape_of(along)[-2]
    count = n if isinstance(n, int) else emit(_aten.sym_size.int, along, len(shape_of(along)) - 2)
    device = val(along).device
    return emit(_aten.unsqueeze.default, emit(_aten.arange.default, count, device=device), 0)
