"""Linear attention with a causal mask, as it was read from a match, and the op that is written for it."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses import causal_decay, heads
from effopt.graph.analyses.causal_decay import Rate, Weight, holds
from effopt.graph.analyses.causal_distance import steps_back
from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.masks.conditions import negated
from effopt.graph.analyses.masks.forms import Band, form_of_condition, places
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.analyses.masks.sums import Magnitude, Sum, whole
from effopt.graph.constants import constant_number, guarded_number
from effopt.graph.rewrite import Emit, Match, Reject, require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten
_CAUSAL = Band(high=whole(0))


@dataclass(frozen=True)
class LinearForm:
    """What one match means. `key` is transposed still; `value` None: ones, the sum of the weights."""

    query: Node
    key: Node
    value: Node | None
    scale: float
    rates: tuple[Rate, ...]
    root: Node


def read(m: Match) -> LinearForm:
    """The linear attention that a match computes. Raises `Reject`."""
    frame = shape_of(m.product)
    rank = len(frame)
    # Products of a tensor and a matrix, with no mask between them, are no attention at all.
    require(bool(m.steps), "", m.root)
    require(2 <= rank <= 4 and {len(shape_of(n)) for n in (m.query, m.key)} == {rank}, "", m.root)
    for operand in (m.query, m.key, *([m.value] if m.value is not None else [])):
        require(is_floating(operand), f"{operand.name} is not a real floating-point tensor", operand)
        require(len(shape_of(operand)) == rank, "", operand)
        lead = equal(shape_of(operand)[:-2], frame[:-2])
        require(lead, f"{operand.name} is broadcast over batch entries or heads", operand)
        require(val(operand).dtype == val(m.root).dtype, f"{operand.name} is of another dtype", operand)
    scale, weight = _fold(m, frame)
    square = equal(frame[-1:], frame[-2:-1])
    require(
        square, f"there are {frame[-2]} queries and {frame[-1]} keys: the first key's place is open", m.root
    )
    require(m.value is None or equal(shape_of(m.value)[-2:-1], frame[-1:]), "", m.root)
    _require_causal(weight, m)
    rates = tuple(_checked(r, frame, m) for r in weight.rates)
    _require_only_weighs(m)
    return LinearForm(m.query, m.key, m.value, scale, rates, m.root)


def _fold(m: Match, frame: tuple[Any, ...]) -> tuple[float, Weight]:
    place, reader = places(frame), Reader()
    scale, weight = 1.0, Weight()
    for step in m.steps:
        same = equal(shape_of(step.node), frame)
        require(same, "the scores are broadcast by a factor or a mask", step.node)
        number = guarded_number(step.factor) if step.tag in ("mul", "div") else None
        if number is not None:
            require(bool(number) and math.isfinite(number), f"the scores are scaled by {number}", step.node)
            scale = scale * number if step.tag == "mul" else scale / number
        elif step.tag == "mul":
            weight = weight * causal_decay.weight_of(step.factor, frame, place, reader)
        elif step.tag in ("tril", "triu"):
            weight = weight.where(causal_decay.triangle(step.node, place))
        elif step.tag in ("keep", "drop"):
            require(constant_number(step.fill) == 0, "masked scores become something else than 0", step.node)
            held = causal_decay.condition_of(step.condition, frame, place, reader)
            weight = weight.where(held if step.tag == "keep" else negated(held))
        else:
            require(step.tag in ("clone", "cast"), "the scores are divided by a tensor or a size", step.node)
            new, scores = val(step.node).dtype, val(m.product).dtype
            require(holds(new, scores), f"the scores, {scores}, are rounded to {new}", step.node)
    return scale, weight


def _require_causal(weight: Weight, m: Match) -> None:
    form = form_of_condition(weight.open)
    if form.terms == (_CAUSAL,):
        return
    rest = [t for t in form.terms if not isinstance(t, Band)]
    require(not rest, f"the mask is more than causal: it hangs on {_names(form)}", m.root)
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
    raise Reject(reason, m.root)


def _names(form: Any) -> str:
    return ", ".join(dict.fromkeys(type(t).__name__.lower() for t in form.terms if not isinstance(t, Band)))


def _checked(rate: Rate, frame: tuple[Any, ...], m: Match) -> Rate:
    """A rate for one step forward. Raises `Reject` where its factor is not a power of the distance."""
    n = steps_back(rate.distance)
    require(n is not None, "the decay is not a power of query index - key index", m.root)
    assert n is not None
    by, scores = rate.by * n, val(m.product).dtype
    require(
        holds(rate.dtype, scores), f"the decay is rounded to {rate.dtype}, the scores are {scores}", m.root
    )
    if rate.node is None:
        require(by <= 0, f"the decay grows: a step multiplies by {_exp(by):.4g}", m.root)
    else:
        of_heads = causal_decay.is_of_heads(rate.node, rate.at)
        require(of_heads, f"the rate {rate.node.name} is not one number a head", rate.node)
    bounded = isinstance(rate.distance.only, Magnitude)
    under_causality = form_of_condition(rate.within).band.high == whole(0)
    small = rate.node is None and isinstance(frame[-1], int) and -by * frame[-1] < _room(rate.dtype)
    require(
        bounded or under_causality or small,
        "the decay may overflow ahead of the diagonal, before a product makes it 0, which gives NaN: take it "
        "of (query - key).clamp(min=0), or select by where or tril",
        m.root,
    )
    return replace(rate, by=by, distance=Sum())


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _room(dtype: torch.dtype) -> float:
    """Logarithm of the greatest number of a dtype."""
    return math.log(torch.finfo(dtype).max)


def _require_only_weighs(m: Match) -> None:
    """The weights are used by products with values and by their sums alone, so that none of them is kept."""
    inside = {m.product, *(step.node for step in m.steps)}
    for node in inside:
        for user in node.users:
            weighs = user.target in (_aten.matmul.default, _aten.bmm.default) and user.args[0] is node
            sums = user.target is _aten.sum.dim_IntList and list(user.args[1]) in (
                [-1],
                [len(shape_of(node)) - 1],
            )
            require(user in inside or weighs or sums, f"the weights are also used by {user.name}", node)


def write(emit: Emit, form: LinearForm) -> Node:
    """Emit the canonical op and what brings its operands and result to shape."""
    rank = len(shape_of(form.query))
    query, key = form.query, _key(emit, form.key)
    ones = form.value is None
    value = form.value
    if value is None:
        value = emit(_aten.new_ones.default, key, [*shape_of(form.query)[:-1], 1])
    for _ in range(4 - rank):
        query, key, value = (emit(_aten.unsqueeze.default, x, 0) for x in (query, key, value))
    given = {"decay": _decay(emit, form.rates, query)} if form.rates else {}
    both = emit(ops.linear_attention, query, key, value, scale=form.scale, **given)
    out = emit(operator.getitem, both, 0)
    if ones and len(shape_of(form.root)) < rank:
        out = emit(_aten.squeeze.dim, out, -1)
    for _ in range(4 - rank):
        out = emit(_aten.squeeze.dim, out, 0)
    return out


def _key(emit: Emit, node: Node) -> Node:
    source = heads.transposed_source(node)
    return emit(_aten.transpose.int, node, -2, -1) if source is None else source


def _decay(emit: Emit, rates: tuple[Rate, ...], query: Node) -> Node:
    """The sum of all rates, `[h]`."""
    h = shape_of(query)[1]
    wide = torch.promote_types(val(query).dtype, torch.float32)
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
