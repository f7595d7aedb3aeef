"""What `effopt::linear_attention` can take of the weights of pairs of tokens, and its decay as calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses import causal_decay
from effopt.graph.analyses.causal_decay import Gates, Rate, Weight, holds
from effopt.graph.analyses.causal_distance import steps_back
from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.masks.conditions import Condition
from effopt.graph.analyses.masks.forms import AXES, Band, form_of_condition, places
from effopt.graph.analyses.masks.sums import Axis, Magnitude, Sum, whole
from effopt.graph.analyses.placed import Placed
from effopt.graph.analyses.segment_sums import SUMMED
from effopt.graph.placed import laid_out
from effopt.graph.rewrite import Emit, Reject, require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_CAUSAL = Band(high=whole(0))
LEAD = ("batch", "head")


@dataclass(frozen=True)
class Where:
    """What is weighted: the products of queries and keys, and the sizes of the weights, `[.., t, t]`."""

    scores: Node
    frame: tuple[Any, ...]
    root: Node


def checked(weight: Weight, where: Where) -> Weight:
    """The weight with its decay for one step forward. Raises `Reject` for what the op has no room for."""
    require_causal(weight, where)
    for factor in weight.factors:
        _require_fine(factor.dtype, where, f"the factor {factor.node.name}")
        Placed(factor.node, factor.at).require_plain(AXES, "a factor of the scores")
    rates = tuple(_checked(r, where) for r in weight.rates)
    return replace(weight, rates=rates, gates=tuple(_checked_gates(g, where) for g in weight.gates))


def require_causal(weight: Weight, where: Where) -> None:
    """Raise `Reject` unless a query sees the keys up to its own, and no other."""
    form = form_of_condition(weight.open)
    if form.terms == (_CAUSAL,):
        return
    rest = [t for t in form.terms if not isinstance(t, Band)]
    require(not rest, f"the mask is more than causal: it hangs on {_names(form)}", where.root)
    band = form.band
    if band == Band():
        reason = "no causal mask is between the products: every query sees every key"
    elif band.low is not None and band.high is None:
        reason = "the mask shows keys behind the query's place alone: it is turned, not causal"
    elif band.low is not None:
        reason = "the mask is a window: keys long before the query are hidden"
    else:
        shift = band.high.number if band.high is not None else None
        kind = "its own key is hidden from a query" if shift == -1 else "the diagonal is shifted"
        reason = f"the mask shows keys up to query + {'?' if shift is None else shift}, not up to it: {kind}"
    raise Reject(reason, where.root)


def _names(form: Any) -> str:
    return ", ".join(dict.fromkeys(type(t).__name__.lower() for t in form.terms if not isinstance(t, Band)))


def _checked(rate: Rate, where: Where) -> Rate:
    """A rate for one step forward. Raises `Reject` where its factor is not a power of the distance."""
    n = steps_back(rate.distance)
    require(n is not None, "the decay is not a power of query index - key index", where.root)
    assert n is not None
    by = rate.by * n
    _require_fine(rate.dtype, where, "the decay")
    if rate.node is None:
        require(by <= 0, f"the decay grows: a step multiplies by {_exp(by):.4g}", where.root)
    else:
        of_heads = causal_decay.is_of_heads(rate.node, rate.at)
        require(of_heads, f"the rate {rate.node.name} is not one number a head", rate.node)
    t = where.frame[-1]
    small = rate.node is None and isinstance(t, int) and -by * t < _room(rate.dtype)
    bounded = isinstance(rate.distance.only, Magnitude) or small
    advice = "take it of (query - key).clamp(min=0), or select by where or tril"
    _require_hidden(rate.within, bounded, advice, where)
    return replace(rate, by=by, distance=Sum())


def _checked_gates(gates: Gates, where: Where) -> Gates:
    gates = behind_the_key(gates, where)
    span = gates.span
    Placed(span.gates, span.at).require_plain((*LEAD, SUMMED), "the gates of a decay")
    long = [s for s, at in zip(shape_of(span.gates), span.at, strict=True) if at.only == Axis(SUMMED, s)]
    words = f"the gates {span.gates.name} are of other tokens than the keys"
    require(equal(long, where.frame[-1:]), words, where.root)
    return gates


def behind_the_key(gates: Gates, where: Where) -> Gates:
    """Gates of the tokens behind the key, up to the query. Raises `Reject` where they are of others."""
    query, key = places(where.frame)[-2:]
    span, by = gates.span, gates.by
    if (span.after, span.upto) == (query, key) and not span.bounded:
        span, by = span.turned, -by
    for wrong, words in (
        (span.begins, "it is summed from the first token on, not between key and query"),
        (span.after == key - 1 and span.upto == query, "the key's own gate is in it: it is off by one"),
        ((span.after, span.upto) != (key, query), "it is not of the tokens behind the key, up to the query"),
    ):
        require(not wrong, f"the decay is a sum of the gates {span.gates.name}, and {words}", where.root)
    _require_fine(gates.dtype, where, "the decay")
    advice = "fill it with -inf ahead of exp, or select by where or tril"
    _require_hidden(gates.within, span.bounded, advice, where)
    return replace(gates, span=span, by=by)


def _require_fine(dtype: torch.dtype, where: Where, what: str) -> None:
    scores = val(where.scores).dtype
    require(holds(dtype, scores), f"{what} is rounded to {dtype}, the scores are {scores}", where.root)


def _require_hidden(within: Condition, bounded: bool, advice: str, where: Where) -> None:
    """That nothing ahead of the diagonal overflows where a product with 0 would hide it."""
    under_causality = form_of_condition(within).band.high == whole(0)
    words = "the decay may overflow ahead of the diagonal, before a product makes it 0, which gives NaN"
    require(bounded or under_causality, f"{words}: {advice}", where.root)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _room(dtype: torch.dtype) -> float:
    """Logarithm of the greatest number of a dtype."""
    return math.log(torch.finfo(dtype).max)


def write(emit: Emit, weight: Weight, query: Node, sizes: Mapping[str, Any]) -> Node | None:
    """The sum of all logarithms: `[h]`, or `[b, h, t]` with gates; None where there is no decay."""
    wide = torch.promote_types(val(query).dtype, torch.float32)
    total = _of_heads(emit, weight.rates, query, wide) if weight.rates else None
    if weight.gates and total is not None:
        total = emit(_aten.view.default, total, [-1, 1])
    for gates in weight.gates:
        found = emit.cast(gates.span.gates, wide)
        found = laid_out(emit, Placed(found, gates.span.at), (*LEAD, SUMMED), sizes)
        found = found if gates.by == 1.0 else emit(_aten.mul.Tensor, found, gates.by)
        total = found if total is None else emit(_aten.add.Tensor, total, found)
    return total


def _of_heads(emit: Emit, rates: tuple[Rate, ...], query: Node, wide: torch.dtype) -> Node:
    """The sum of all rates, `[h]`."""
    h = shape_of(query)[1]
    number = sum(r.by for r in rates if r.node is None)
    total = emit(_aten.new_full.default, query, [h], number, dtype=wide)
    for rate in rates:
        if rate.node is None:
            continue
        found = emit(_aten._to_copy.default, rate.node, dtype=wide)
        found = emit(_aten.log.default, found) if rate.is_base else found
        for dim in reversed(range(len(rate.at))):
            index = rate.at[dim].number
            if index is not None and len(shape_of(found)) > 0:
                found = emit(_aten.select.int, found, dim, index)
        found = found if rate.by == 1.0 else emit(_aten.mul.Tensor, found, rate.by)
        total = emit(_aten.add.Tensor, total, found)
    return total
