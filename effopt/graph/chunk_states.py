"""The states of a linear attention in chunks: of each chunk alone, and of all that came before it.

    alone[c]    = sum over tokens l of c:        key_l^T value_l * exp(G[c, last] - G[c, l])
    before[row] = sum over sources z up to row:  exp(totals of chunks z .. row - 1) * cat([start, alone])[z]

G is a cumulative sum of gates in each chunk; `before[c]` is what the first token of chunk c finds, and the
last row is the state after all of them. The sums of totals are segment sums of `pad(G[.., last], (1, 0))`.
Looks only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.causal_decay import Gates, Weight, holds, weight_at
from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.moves import Place
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.analyses.masks.sums import Axis, Sum, of, whole
from effopt.graph.analyses.padding import zeros_around
from effopt.graph.analyses.placed import Placed
from effopt.graph.analyses.products import Product, product_at
from effopt.graph.analyses.segment_sums import SUMMED, span_of
from effopt.graph.constants import constant_number
from effopt.graph.matching import bound_arguments
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten


def weight_of(factors: Iterable[Placed]) -> Weight:
    """The product of factors, read as a decay. Raises `Reject` at one that is none."""
    weight = Weight()
    for factor in factors:
        weight = weight * weight_at(factor.node, factor.at, Reader())
    return weight


@dataclass(frozen=True)
class Chunked:
    """What tokens are multiplied with, each read at (batch, head, chunk, key or query, m or n)."""

    queries: tuple[Placed, ...]
    keys: tuple[Placed, ...]
    values: tuple[Placed, ...]
    gates: Gates
    """Behind the key, up to the query, in one chunk."""
    chunks: int
    tokens: int
    """Of one chunk."""
    root: Node

    @property
    def chunk(self) -> Sum:
        """The index of a chunk."""
        return of(Axis("chunk", self.chunks))

    def require_gates(self, gates: Gates, after: Sum, upto: Sum, what: str) -> None:
        """Raise `Reject` unless a decay is of the same gates, behind one token of a chunk up to another."""
        span, own = gates.span, self.gates.span
        same = (span.gates, span.at) == (own.gates, own.at) and gates.by == self.gates.by
        require(same, f"{what} decays by other gates than the pairs of tokens do", self.root)
        words = f"{what} does not decay from the token where it ends to the one where it is read"
        require((span.after, span.upto) == (after, upto), words, self.root)

    def decay(self, factors: Iterable[Placed], what: str, count: int = 1) -> Weight:
        """The product of decays, if it is of so many sums of gates and of nothing else. Raises `Reject`."""
        weight = weight_of(factors)
        alone = len(weight.gates) == count and not (weight.rates or weight.factors)
        words = f"{what} is multiplied with {len(weight.gates)} decays by gates, and not just with {count}"
        require(alone, words, self.root)
        dtype = val(self.root).dtype
        fine = all(holds(gates.dtype, dtype) for gates in weight.gates)
        require(fine, f"the decay of {what} is rounded to fewer digits than {dtype} has", self.root)
        return weight


@dataclass(frozen=True)
class States:
    """What is read of all chunks at one row: factors of tokens besides, and decays."""

    others: tuple[Placed, ...]
    decays: tuple[Placed, ...]
    start: Placed | None
    """The state before the first chunk; None: zeros."""
    alone: Node
    alone_at: Place
    summed: Placed
    """The call that sums over them."""


def states_in(product: Product, root: Node) -> States:
    """The states that a product reads. Raises `Reject`."""
    joined = [f for f in product.factors if f.node.target is _aten.cat.default]
    require(len(joined) == 1, "no state of the chunks before is added to what a chunk computes alone", root)
    (cat,) = joined
    joins, dim = bound_arguments(cat.node).values()
    dim = dim % len(cat.at)
    name = next(iter(c.axes_of(cat.at[dim])), "")
    words = "the states of chunks are not summed over all chunks before, and a state before the first"
    require(len(joins) == 2 and name in product.summed and cat.at[dim].only is not None, words, root)
    inner = [x for x in product.summed if x != name]
    require(len(inner) <= 1, words, root)
    product = product.named({name: "source"} | dict.fromkeys(inner, "m"))
    (cat,) = (f for f in product.factors if f.node is cat.node)
    first, alone = joins
    require(statically_known_true(shape_of(first)[dim] == 1), words, root)
    start = (
        None if constant_number(first) == 0 else Placed(first, (*cat.at[:dim], whole(0), *cat.at[dim + 1 :]))
    )
    rest = [f for f in product.factors if f.node is not cat.node]
    decays = tuple(f for f in rest if not c.axes_of(f.at) & {"m", "n"})
    others = tuple(f for f in rest if f not in decays)
    return States(others, decays, start, alone, cat.at, product.summed["source"])


def require_alone(states: States, chunked: Chunked) -> None:
    """Raise `Reject` unless the state of each chunk is of its keys and values, decayed to its end."""
    what = "the state of a chunk"
    at = tuple(chunked.chunk if c.axes_of(p) == {"source"} else p for p in states.alone_at)
    sizes = [
        s for s, p in zip(shape_of(states.alone), states.alone_at, strict=True) if c.axes_of(p) == {"source"}
    ]
    require(
        equal(sizes, [chunked.chunks]), f"there are {sizes} states of {chunked.chunks} chunks", chunked.root
    )
    product = product_at(states.alone, at)
    require(len(product.summed) == 1, f"{what} is not a sum over its tokens", chunked.root)
    product = product.named(dict.fromkeys(product.summed, "key"))
    operands = Counter((*chunked.keys, *chunked.values))
    decays = [f for f in product.factors if f not in operands]
    same = Counter(f for f in product.factors if f in operands) == operands
    require(same, f"{what} is not of the keys and values that the pairs of tokens are of", chunked.root)
    weight = chunked.decay(decays, what)
    require(weight.open == c.TRUE, f"{what} is not of all its tokens", chunked.root)
    key, last = of(Axis("key", chunked.tokens)), whole(chunked.tokens - 1)
    chunked.require_gates(weight.gates[0], key, last, what)


def require_carried(decays: Sequence[Placed], row: Sum, chunked: Chunked) -> Gates | None:
    """Raise `Reject` unless the states of sources up to `row` decay by the totals of the chunks between.

    Returns:
        The decay that is left: of tokens from the start of a chunk on.
    """
    what = "the state before a chunk"
    inner = [f for f in decays if "query" in c.axes_of(f.at)]
    weight = chunked.decay(decays, what, 1 + bool(inner))
    source = of(Axis("source", chunked.chunks + 1))
    shown = c.at_most(source - row)
    require(weight.open == shown, f"{what} is not of just the chunks before it", chunked.root)
    own = chunked.gates.span.gates
    others = [g for g in weight.gates if g.span.gates is not own]
    words = f"{what} does not decay by totals of chunks, or is read with other gates than those of the pairs"
    require(len(others) == 1, words, chunked.root)
    (carried,) = others
    require(carried.span.bounded or carried.within == shown, f"{what} may overflow", chunked.root)
    inside = zeros_around(carried.span.gates)
    words = f"{what} does not decay by the totals of the chunks between"
    ends = (carried.span.after, carried.span.upto) == (source, row)
    require(inside is not None and ends, words, chunked.root)
    assert inside is not None
    _require_totals(carried, *inside, chunked, words)
    rest = [g for g in weight.gates if g is not carried]
    return rest[0] if rest else None


def _require_totals(
    carried: Gates, total: Node, around: Sequence[tuple[Any, Any]], chunked: Chunked, words: str
) -> None:
    at = carried.span.at
    shifted = tuple((1, 0) if p.only == Axis(SUMMED, 0) else (0, 0) for p in at)
    require(tuple(around) == shifted and (1, 0) in shifted, words, chunked.root)
    place = tuple(chunked.chunk if p.only == Axis(SUMMED, 0) else p for p in at)
    found = span_of(total, place, Reader())
    require(found is not None, words, chunked.root)
    assert found is not None
    span, by = found
    whole_chunk = Gates(span, by * carried.by, dtype=span.dtype)
    chunked.require_gates(whole_chunk, whole(-1), whole(chunked.tokens - 1), "the total of a chunk")
