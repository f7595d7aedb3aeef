"""Sums of gates between two places of a tensor, however a model takes them.

    G = cumsum(g); G[.., :, None] - G[.., None, :]                 of places behind the key, up to the query
    cumsum(g[.., None].expand(t, t).masked_fill(~below, 0), -2)    the same, and 0 ahead of the diagonal

Looks only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.causal_distance import CASTS, choice_at, origin_of, place_in, triangle
from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.moves import Place, source_of
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.analyses.masks.sums import Axis, Sum, of, whole
from effopt.graph.constants import constant_number, scaled
from effopt.graph.rewrite import Reject
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten
_SIGNS = {_aten.add.Tensor: 1.0, _aten.sub.Tensor: -1.0}
SUMMED = "summed"
"""The name of the axis that is summed over, in the place of a `Span`."""


@dataclass(frozen=True)
class Span:
    """The sum of the elements of `gates` for all places behind `after`, up to `upto`, that one included.

    Where `upto` is ahead of `after`, it is minus the sum of what is between; 0 if it is `bounded`.
    """

    gates: Node
    at: Place
    """Where they are read: one of its axes is called `summed`."""
    after: Sum
    upto: Sum
    bounded: bool = False
    dtype: torch.dtype = torch.float32
    """The narrowest that holds it on its way."""

    @property
    def begins(self) -> bool:
        """Whether it is a sum from the first place on."""
        return self.after == whole(-1)

    @property
    def turned(self) -> Span:
        """Minus itself."""
        return replace(self, after=self.upto, upto=self.after)


def narrower(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The one of two floating-point dtypes that has fewer digits."""
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


def span_of(node: Node, place: Place, reader: Reader) -> tuple[Span, float] | None:
    """A span, and what it is multiplied by; None where `node` is no sum of gates. Raises `Reject`."""
    terms = _terms(node, place, reader)
    if not terms:
        return None
    if len(terms) == 1:
        return terms[0]
    (one, by), (other, less) = terms[0], terms[-1]
    between = replace(one, after=other.upto, dtype=narrower(one.dtype, other.dtype))
    same = len(terms) == 2 and one.begins and other.begins and by == -less
    if not same or between != replace(other, after=other.upto, upto=one.upto, dtype=between.dtype):
        raise Reject(f"the decay, {node.name}, is no difference of one cumulative sum at two tokens", node)
    return between, by


def _terms(node: Any, place: Place, reader: Reader, by: float = 1.0) -> list[tuple[Span, float]]:
    """Cumulative sums, and what each is multiplied by; none where there is anything else in it."""
    if not isinstance(node, Node) or not is_floating(node):
        return []
    moved = source_of(node, place)
    if moved is not None:
        return _terms(*moved, reader, by)
    args: Any = node.args
    if node.target is _aten.cumsum.default:
        found = _cumulative(node, place, reader)
        return [] if found is None else [(found, by)]
    if node.target in CASTS:
        inner = _terms(args[0], place_in(node, args[0], place), reader, by)
        return [(replace(s, dtype=narrower(s.dtype, val(node).dtype)), n) for s, n in inner]
    if (times := scaled(node)) is not None:
        return _terms(times[0], place_in(node, times[0], place), reader, by * times[1])
    if node.target not in _SIGNS or node.kwargs or not all(isinstance(a, Node) for a in args):
        return []
    one = _terms(args[0], place_in(node, args[0], place), reader, by)
    other = one and _terms(args[1], place_in(node, args[1], place), reader, by * _SIGNS[node.target])
    return [*one, *other] if other else []


def _cumulative(node: Node, place: Place, reader: Reader) -> Span | None:
    args: Any = node.args
    source, dim = args[0], args[1] % len(place)
    along = of(Axis(SUMMED, shape_of(source)[dim]))
    held: c.Condition = c.TRUE
    source, at = origin_of(source, (*place[:dim], along, *place[dim + 1 :]))
    if source.target is _aten.tril.default:
        held = triangle(source, at)
        args = source.args
        source, at = origin_of(args[0], at)
    elif (chosen := choice_at(source, at, reader)) is not None:
        held, inner, no = chosen
        if constant_number(no) != 0 or not isinstance(inner, Node):
            return None
        source, at = origin_of(inner, place_in(source, inner, at))
    if not is_floating(source):
        return None
    after = _first(held, along)
    if after is None:
        return None
    return Span(source, at, after - 1, place[dim], held != c.TRUE, val(node).dtype)


def _first(held: c.Condition, along: Sum) -> Sum | None:
    """The first place that a condition holds for, if it holds from there on."""
    if held == c.TRUE:
        return whole(0)
    axis = along.only
    if not isinstance(held, c.AtMost) or axis is None or dict(held.of.terms).get(axis) != -1:
        return None
    return held.of + along
