"""Linear attention with a causal mask, as it was read from a match, and the op that is written for it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effopt.graph import linear_attention_decay, ops
from effopt.graph.analyses import causal_decay, heads
from effopt.graph.analyses.causal_decay import Weight, holds
from effopt.graph.analyses.causal_distance import place_in, triangle
from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.masks.conditions import Condition, negated
from effopt.graph.analyses.masks.forms import AXES, places
from effopt.graph.analyses.masks.moves import Place, aligned, source_of
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.analyses.masks.sums import Axis, of
from effopt.graph.analyses.placed import Placed
from effopt.graph.analyses.segment_sums import SUMMED
from effopt.graph.constants import constant_number, guarded_number
from effopt.graph.linear_attention_decay import LEAD, Where
from effopt.graph.placed import laid_out
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten


@dataclass(frozen=True)
class LinearForm:
    """What one match means."""

    query: Placed
    key: Placed
    value: Placed | None
    """None: ones, for the sum of the weights."""
    scale: float
    weight: Weight
    frame: tuple[Any, ...]
    """Sizes of the weights, `[.., t, t]`."""
    root: Node


def read(m: Match) -> LinearForm:
    """The linear attention that a match computes. Raises `Reject`."""
    # Products of a tensor and a matrix, with no mask between them, are no attention at all.
    require(any(step.tag != "move" for step in m.steps), "", m.root)
    frame = shape_of(m.steps[-1].node)
    require(2 <= len(frame) <= 4, "", m.root)
    for operand in (m.query, m.key, *([m.value] if m.value is not None else [])):
        require(is_floating(operand), f"{operand.name} is not a real floating-point tensor", operand)
        require(2 <= len(shape_of(operand)) <= len(frame), "", operand)
        require(val(operand).dtype == val(m.root).dtype, f"{operand.name} is of another dtype", operand)
    lead = _place_of_product(m, frame)[:-2]
    scale, weight = _fold(m, frame)
    square = equal(frame[-1:], frame[-2:-1])
    require(
        square, f"there are {frame[-2]} queries and {frame[-1]} keys: the first key's place is open", m.root
    )
    weight = linear_attention_decay.checked(weight, Where(m.product, frame, m.root))
    _require_only_weighs(m)
    inner = shape_of(m.product)
    query = _operand(m.query, (*lead, "query", "m"), (*inner[:-1], shape_of(m.query)[-1]))
    key = _operand(m.key, (*lead, "m", "key"), (*inner[:-2], *shape_of(m.key)[-2:]))
    value = None if m.value is None else _value(m, frame)
    return LinearForm(query, key, value, scale, weight, frame, m.root)


def _operand(node: Node, axes: tuple[Any, ...], frame: tuple[Any, ...]) -> Placed:
    """An operand of a product of matrices, its last two axes by name."""
    place = tuple(of(Axis(a, size)) if isinstance(a, str) else a for a, size in zip(axes, frame, strict=True))
    source = heads.transposed_source(node)
    at = aligned(node, frame, place)
    require(at is not None, "", node)
    assert at is not None
    found = Placed(node, at) if source is None else Placed(source, (*at[:-2], at[-1], at[-2]))
    found.require_plain((*AXES, "m", "n"), "an operand of a product")
    return found


def _value(m: Match, frame: tuple[Any, ...]) -> Placed:
    whole_frame = equal(shape_of(m.root)[:-1], frame[:-1])
    require(whole_frame, f"{m.value.name} has batch entries or heads that the weights have not", m.root)
    sizes = (*frame[:-2], frame[-1], shape_of(m.value)[-1])
    return _operand(m.value, (*places(frame)[:-2], "key", "n"), sizes)


def _inward(m: Match, frame: tuple[Any, ...]) -> Iterator[tuple[Any, Place, Node]]:
    """Each step from the outermost on, the place at which it is read, and what it is taken of."""
    place = places(frame)
    for i in reversed(range(len(m.steps))):
        step, inner = m.steps[i], m.steps[i - 1].node if i else m.product
        yield step, place, inner
        place = _moved(step.node, inner, place)


def _moved(node: Node, inner: Node, place: Place) -> Place:
    """The place in `inner` that `node` reads for a place."""
    moved = source_of(node, place)
    by_size = moved is None and node.target is _aten.repeat_interleave.self_int
    require(not by_size, "the heads are repeated by a size", node)
    return place_in(node, inner, place) if moved is None else moved[1]


def _place_of_product(m: Match, frame: tuple[Any, ...]) -> Place:
    """Where the products of queries and keys are read for a place of the weights."""
    (step, place, inner) = tuple(_inward(m, frame))[-1]
    found = _moved(step.node, inner, place)
    rows = places(frame)[-2:]
    require(
        len(found) >= 2 and found[-2:] == rows, "queries and keys change places between the products", m.root
    )
    return found


def _fold(m: Match, frame: tuple[Any, ...]) -> tuple[float, Weight]:
    reader, scale, weight = Reader(), 1.0, Weight()
    for step, place, _ in reversed(tuple(_inward(m, frame))):
        own = shape_of(step.node)
        number = guarded_number(step.factor) if step.tag in ("mul", "div") else None
        if number is not None:
            require(bool(number) and math.isfinite(number), f"the scores are scaled by {number}", step.node)
            scale = scale * number if step.tag == "mul" else scale / number
        elif step.tag == "mul":
            weight = weight * causal_decay.weight_of(step.factor, own, place, reader)
        elif step.tag in ("tril", "triu"):
            weight = weight.where(triangle(step.node, place))
        elif step.tag in ("keep", "drop"):
            weight = weight.where(_kept(step, own, place, reader))
        elif step.tag == "dropout":
            words = (
                "dropout is applied to the weights in training, each of which it draws for: apply it to the"
            )
            require(
                not (step.train and step.p), f"{words} values or to the result, or set it to 0", step.node
            )
        else:
            tags = ("move", "clone", "cast")
            require(step.tag in tags, "the scores are divided by a tensor or a size", step.node)
            new, scores = val(step.node).dtype, val(m.product).dtype
            require(holds(new, scores), f"the scores, {scores}, are rounded to {new}", step.node)
    return scale, weight


def _kept(step: Any, sizes: tuple[Any, ...], place: Place, reader: Reader) -> Condition:
    """Where a selection keeps the scores."""
    require(constant_number(step.fill) == 0, "masked scores become something else than 0", step.node)
    held = causal_decay.condition_of(step.condition, sizes, place, reader)
    return held if step.tag == "keep" else negated(held)


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
    lead = (*(1,) * (4 - len(form.frame)), *form.frame)[:2]
    t, d = form.frame[-1], shape_of(form.query.node)[-1]
    sizes = dict(zip(LEAD, lead, strict=True)) | {"query": t, "key": t, SUMMED: t, "m": d}
    query = laid_out(emit, form.query, (*LEAD, "query", "m"), sizes)
    key = laid_out(emit, form.key, (*LEAD, "key", "m"), sizes)
    if form.value is None:
        value = emit(_aten.new_ones.default, key, [*shape_of(query)[:-1], 1])
    else:
        sizes["n"] = shape_of(form.value.node)[-1]
        value = laid_out(emit, form.value, (*LEAD, "key", "n"), sizes)
    for factor in form.weight.factors:
        by = laid_out(emit, Placed(factor.node, factor.at), (*LEAD, "key"), sizes)
        by = emit(_aten.unsqueeze.default, emit.cast(by, val(value).dtype), -1)
        value = emit(_aten.mul.Tensor, value, by)
    decay = linear_attention_decay.write(emit, form.weight, query, sizes)
    given = {} if decay is None else {"decay": decay}
    both = emit(ops.linear_attention, query, key, value, scale=form.scale, **given)
    out = emit(operator.getitem, both, 0)
    if form.value is None and len(shape_of(form.root)) < len(form.frame):
        out = emit(_aten.squeeze.dim, out, -1)
    for _ in range(4 - len(form.frame)):
        out = emit(_aten.squeeze.dim, out, 0)
    return out
