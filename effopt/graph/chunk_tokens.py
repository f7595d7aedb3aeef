"""The operands of a linear attention in chunks, by tokens: without chunks, and without zeros at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.masks.conditions import axes_of
from effopt.graph.analyses.masks.sums import Axis, Sum, of
from effopt.graph.analyses.padding import zeros_around
from effopt.graph.analyses.placed import Placed
from effopt.graph.analyses.products import named
from effopt.graph.analyses.segment_sums import SUMMED
from effopt.graph.chunk_states import Chunked
from effopt.graph.placed import laid_out
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten


@dataclass(frozen=True)
class Tokens:
    """Operands, each read at (batch, head, token, m or n), without zeros behind the last token."""

    queries: tuple[Placed, ...]
    keys: tuple[Placed, ...]
    values: tuple[Placed, ...]
    gates: Placed
    by: float
    """What the gates are multiplied by."""
    start: Placed | None
    """The state before the first token; None: zeros."""
    chunks: int
    tokens: int
    """Of one chunk."""
    padded: int
    """How many zeros were behind the last token."""

    @property
    def operands(self) -> tuple[Placed, ...]:
        """All of them."""
        start = () if self.start is None else (self.start,)
        return (*self.queries, *self.keys, *self.values, self.gates, *start)


def by_tokens(chunked: Chunked, start: Placed | None) -> Tokens:
    """Operands by tokens; without zeros behind the last one if all have the same number. Raises `Reject`."""
    span = chunked.gates.span
    one = {"query": "key", SUMMED: "key"}
    groups = [[Placed(p.node, named(p.at, one)) for p in group] for group in
              (chunked.queries, chunked.keys, chunked.values, [Placed(span.gates, span.at)])]  # fmt: skip
    token = chunked.chunk * chunked.tokens + of(Axis("key", chunked.tokens))
    cut = [[_cut(p, token) for p in group] for group in groups]
    behind = {number for group in cut for _, number in group}
    (padded,) = behind if len(behind) == 1 else (0,)
    if len(behind) == 1:
        groups = [[p for p, _ in group] for group in cut]
    index = of(Axis("token", chunked.chunks * chunked.tokens - padded))
    queries, keys, values, gates = (
        tuple(Placed(p.node, tuple(index if at == token else at for at in p.at)) for p in group)
        for group in groups
    )
    by, (chunks, size) = chunked.gates.by, (chunked.chunks, chunked.tokens)
    found = Tokens(queries, keys, values, gates[0], by, start, chunks, size, padded)
    _require_operands(found, chunked.root)
    return found


def _cut(placed: Placed, token: Sum) -> tuple[Placed, int]:
    """What is padded with zeros behind the last token, and how many of them."""
    inside = zeros_around(placed.node)
    dims = [dim for dim, at in enumerate(placed.at) if at == token]
    if inside is None or len(dims) != 1:
        return placed, 0
    source, around = inside
    behind = around[dims[0]][1]
    alone = all(pair == (0, 0) for dim, pair in enumerate(around) if dim != dims[0])
    fits = alone and around[dims[0]][0] == 0 and type(behind) is int and behind >= 0
    return (Placed(source, placed.at), behind) if fits else (placed, 0)


def _require_operands(found: Tokens, root: Node) -> None:
    for placed in found.operands:
        placed.require_plain(("batch", "head", "token", "chunk", "key", "m", "n"), "an operand")
        require(is_floating(placed.node), f"{placed.node.name} is no floating-point tensor", root)
        same = placed is found.gates or val(placed.node).dtype == val(root).dtype
        require(same, f"{placed.node.name} is of another dtype than the sum", root)


def written(emit: Emit, found: Tokens, sizes: Mapping[str, Any]) -> tuple[Node, Node, Node, Node, Node]:
    """Emit query, key, value, decay and state, as the op takes them.

    Args:
        emit: takes the calls.
        found: the operands.
        sizes: of batch, head and n.
    """
    placed = [(at, size) for p in found.keys for at, size in zip(p.at, shape_of(p.node), strict=True)]
    m = next((size for at, size in placed if "m" in axes_of(at)), 1)
    token = found.chunks * found.tokens - found.padded
    every = {**sizes, "m": m, "key": found.tokens, "chunk": found.chunks, "token": token}
    query, key = (_product(emit, group, "m", every) for group in (found.queries, found.keys))
    value = _product(emit, found.values, "n", every)
    wide = torch.promote_types(val(query).dtype, torch.float32)
    gates = Placed(emit.cast(found.gates.node, wide), found.gates.at)
    decay = _one(emit, gates, (), every)
    decay = decay if found.by == 1.0 else emit(_aten.mul.Tensor, decay, found.by)
    state_axes = ("batch", "head", "m", "n")
    if found.start is not None:
        state = emit.cast(laid_out(emit, found.start, state_axes, every), wide)
    else:
        # A gate of the first token that is NaN or infinite spoils zeros: 0 * NaN is NaN.
        state = emit(_aten.new_zeros.default, query, [every[axis] for axis in state_axes], dtype=wide)
    return query, key, value, decay, state


def _product(emit: Emit, group: Sequence[Placed], last: str, sizes: Mapping[str, Any]) -> Node:
    first, *others = (_one(emit, placed, (last,), sizes) for placed in group)
    for other in others:
        first = emit(_aten.mul.Tensor, first, other)
    return first


def _one(emit: Emit, placed: Placed, last: tuple[str, ...], sizes: Mapping[str, Any]) -> Node:
    """One operand, `[batch, head, token, *last]`."""
    apart = {"chunk", "key"} & axes_of(placed.at)
    axes = ("chunk", "key") if apart else ("token",)
    node = laid_out(emit, placed, ("batch", "head", *axes, *last), sizes)
    if not apart:
        return node
    return emit(_aten.reshape.default, node, [sizes[x] for x in ("batch", "head", "token", *last)])
