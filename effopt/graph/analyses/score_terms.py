"""What happens to attention scores between `query @ key^T` and softmax, as one formula.

    scores = softcap * tanh(scale * q k^T / softcap) + sum of coefficient * term, where all masks are True

Reads the steps of a chain from the product outwards and keeps this form after each: a number that
comes after a mask also scales the mask's fill, one after a term scales the term. Steps that leave
the form are refused with a reason. Looks only; emits nothing. Exact in real arithmetic; a mask that
is written as a huge finite number added to the scores stays a term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.heads import broadcasts, equal
from effopt.graph.analyses.masks.least_number import least_number
from effopt.graph.analyses.row_maximum import is_row_maximum
from effopt.graph.analyses.score_formula import ABSORBING, Scores, Shape, Term
from effopt.graph.constants import constant_number, guarded_number
from effopt.graph.pattern import Step
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten


def fold(start: Scores, steps: Sequence[Step]) -> Scores:
    """The formula after `steps`, innermost first. Raises `Reject`."""
    scores = start
    for step in steps:
        scores = _STEPS[step.tag](scores, step)
    return scores


def _inner(step: Step) -> Any:
    """The node that a one-operand step reads."""
    return step.node.args[0]


def _number(value: Any) -> float | None:
    found = guarded_number(value)
    return None if found is None else float(found)


def _scaled(scores: Scores, by: float, where: Node) -> Scores:
    has_additions = bool(scores.terms or scores.masks)
    require(math.isfinite(by) and by != 0.0, f"the scores are scaled by {by}", where)
    require(by > 0 or not has_additions, f"masked scores are scaled by a negative number, {by}", where)
    fill = scores.fill
    if fill is not None:
        fill *= by
        limit = torch.finfo(val(where).dtype).max
        require(
            math.isinf(scores.fill or 0.0) or abs(fill) <= limit,
            f"scaling after the mask makes its fill {scores.fill} overflow; scale before masking",
            where,
        )
    terms = tuple(_scale_term(t, by) for t in scores.terms)
    return replace(scores, scale=scores.scale * by, softcap=scores.softcap * by, terms=terms, fill=fill)


def _scale_term(term: Term, by: float) -> Term:
    return replace(term, coefficient=term.coefficient * by)


def _mul(scores: Scores, step: Step) -> Scores:
    by = _number(step.factor)
    return _scaled(scores, by, step.node) if by is not None else _by_tensor(scores, step)


def _div(scores: Scores, step: Step) -> Scores:
    by = _number(step.factor)
    require(by != 0, "the scores are divided by zero", step.node)
    return _scaled(scores, 1.0 / by, step.node) if by is not None else _by_tensor(scores, step)


def _by_tensor(scores: Scores, step: Step) -> Scores:
    factor = step.factor
    require(isinstance(factor, Node), "the scores are scaled by a symbolic number", step.node)
    sizes = shape_of(factor)
    require(
        not sizes or statically_known_true(sizes[-1] == 1),
        "the scores are multiplied elementwise by a tensor that differs between keys",
        step.node,
    )
    plain = not (scores.terms or scores.masks or scores.softcap or scores.frame_args)
    require(
        plain, "a tensor scales the scores after a mask, bias, soft-cap or reshape was applied", step.node
    )
    require(len(sizes) <= len(shape_of(step.node)), "a scale adds dimensions to the scores", step.node)
    op = step.node.target
    return replace(scores, factors=(*scores.factors, (op, factor)))


def _tanh(scores: Scores, step: Step) -> Scores:
    plain = not (scores.terms or scores.masks or scores.softcap)
    require(plain, "tanh of scores that already have a mask, bias or soft-cap", step.node)
    return replace(scores, softcap=1.0)


def _add(scores: Scores, step: Step) -> Scores:
    return _plus(scores, step, 1.0)


def _sub(scores: Scores, step: Step) -> Scores:
    return _plus(scores, step, -1.0)


def _shift(scores: Scores, step: Step) -> Scores:
    require(is_row_maximum(step.peak, _inner(step)), "a maximum over something else is subtracted", step.node)
    return scores


def _plus(scores: Scores, step: Step, sign: float) -> Scores:
    number = constant_number(step.term)
    if number == 0:
        return scores
    require(isinstance(step.term, Node), "a number is added to all scores", step.node)
    if not isinstance(val(step.term), torch.Tensor):
        require(False, "a symbolic number is added to all scores", step.node)
    require(val(step.term).dtype != torch.bool, "a boolean tensor is added to the scores", step.node)
    scores = _masks_as_terms(scores, step.node)
    term = _in_frame(Term(step.term, sign), scores, step.node)
    return replace(scores, terms=(*scores.terms, term))


def _masks_as_terms(scores: Scores, where: Node) -> Scores:
    """`where(m, s, -inf) + b` is `where(m, s + b, -inf)`; an absorbing fill becomes a term of its own."""
    if not scores.masks or scores.fill == -math.inf:
        return scores
    fill = scores.fill
    require(
        fill is not None and fill <= ABSORBING,
        f"a bias is added after scores were masked with {fill}; add it before masking, or fill with -inf",
        where,
    )
    masks = tuple(replace(m, fill=fill) for m in scores.masks)
    return replace(scores, terms=(*scores.terms, *masks), masks=(), fill=None)


def _keep(scores: Scores, step: Step) -> Scores:
    return _mask(scores, step, inverted=False)


def _drop(scores: Scores, step: Step) -> Scores:
    return _mask(scores, step, inverted=True)


def _mask(scores: Scores, step: Step, inverted: bool) -> Scores:
    condition, fill = step.condition, _number(step.fill)
    require(fill is not None, "masked scores are replaced by a tensor, not by one number", step.node)
    assert fill is not None
    require(
        isinstance(condition, Node) and val(condition).dtype == torch.bool,
        "the mask is not boolean",
        step.node,
    )
    require(not math.isnan(fill) and fill != math.inf, f"masked scores become {fill}", step.node)
    require(
        scores.fill is None or scores.fill == fill,
        f"two masks fill with different numbers, {scores.fill} and {fill}; use one fill",
        step.node,
    )
    condition, inverted = _strip_not(condition, inverted)
    mask = _in_frame(Term(condition, inverted=inverted), scores, step.node)
    return replace(scores, masks=(*scores.masks, mask), fill=fill)


def _strip_not(node: Node, inverted: bool) -> tuple[Node, bool]:
    while node.target in (_aten.logical_not.default, _aten.bitwise_not.default):
        inner = node.args[0]
        if not isinstance(inner, Node) or val(inner).dtype != torch.bool:
            break
        node, inverted = inner, not inverted
    return node, inverted


def _floor(scores: Scores, step: Step) -> Scores:
    """`max(scores, least)`: lifts what is masked by a lower number, and nothing that a model computes."""
    least = constant_number(step.least)
    require(least is not None, "the greater of the scores and of a tensor is taken", step.node)
    assert least is not None
    require(
        equal(shape_of(_inner(step)), shape_of(step.node)),
        "a tensor of numbers enlarges the scores",
        step.node,
    )
    if least == -math.inf:
        return scores
    reachable = least > ABSORBING
    require(
        not reachable, f"scores are no less than {least}, which scores may reach by themselves", step.node
    )
    for term in scores.terms:
        known = term.fill is not None or least_number(term.node, term.coefficient) > -math.inf
        require(
            known, "scores have a bias that may be -inf, and are no less than a number after it", step.node
        )
    terms = tuple(t if t.fill is None else replace(t, fill=max(t.fill, least)) for t in scores.terms)
    fill = None if scores.fill is None else max(scores.fill, least)
    halves = bool(terms) and step.node.target not in (_aten.clamp.default, _aten.clamp_min.default)
    return replace(scores, terms=terms, fill=fill, halves=scores.halves or halves)


def _cast(scores: Scores, step: Step) -> Scores:
    require(val(step.node).dtype.is_floating_point, "the scores are cast to an integer type", step.node)
    return scores


def _dropout(scores: Scores, step: Step) -> Scores:
    require(not step.train or step.p == 0, "dropout on the scores, before softmax", step.node)
    return scores


def _view(scores: Scores, step: Step) -> Scores:
    before, after = shape_of(_inner(step)), shape_of(step.node)
    require(
        len(before) >= 2 and len(after) >= 2, "the scores are reshaped to fewer than 2 dimensions", step.node
    )
    require(
        equal(before[-2:], after[-2:]),
        f"the scores are reshaped from {list(before)} to {list(after)}: rows or keys move",
        step.node,
    )
    frame = after[:-2]
    if len(frame) <= len(scores.widest):
        regrouped = len(frame) == len(scores.widest) and not equal(frame, scores.widest)
        require(
            not regrouped,
            f"the batch and head dimensions {list(scores.widest)} become {list(frame)}",
            step.node,
        )
        return replace(scores, frame=frame)
    lead = tuple(step.sizes[:-2])
    terms = tuple(_to_frame(t, scores, lead, step.node) for t in scores.terms)
    masks = tuple(_to_frame(m, scores, lead, step.node) for m in scores.masks)
    return replace(scores, frame=frame, widest=frame, frame_args=lead, terms=terms, masks=masks)


def _to_frame(term: Term, scores: Scores, lead: Shape, where: Node) -> Term:
    sizes = shape_of(term.node)[:-2]
    if all(statically_known_true(s == 1) for s in sizes):
        return term
    return replace(term, lead=_full(sizes, scores.frame, lead, where))


def _in_frame(term: Term, scores: Scores, where: Node) -> Term:
    """A term at the present frame, brought to the widest one."""
    own, total = shape_of(term.node), shape_of(where)
    require(
        broadcasts(own, total),
        f"a mask or bias {list(own)} does not broadcast to the scores {list(total)}",
        where,
    )
    require(equal(total[:-2], scores.frame), f"a mask or bias enlarges the scores to {list(total)}", where)
    sizes = own[:-2]
    if len(scores.widest) == len(scores.frame) or all(statically_known_true(s == 1) for s in sizes):
        return term
    return replace(term, lead=_full(sizes, scores.frame, scores.frame_args or scores.widest, where))


def _full(sizes: Shape, frame: Shape, lead: Shape, where: Node) -> Shape:
    reason = "a mask or bias broadcasts over merged batch and head dimensions; apply it in 4-D"
    require(equal(sizes, frame), reason, where)
    require(not any(isinstance(s, torch.SymInt) for s in lead), reason, where)
    return lead


_STEPS: dict[str, Callable[[Scores, Step], Scores]] = {
    "mul": _mul,
    "div": _div,
    "tanh": _tanh,
    "add": _add,
    "sub": _sub,
    "shift": _shift,
    "keep": _keep,
    "drop": _drop,
    "masked": _drop,
    "floor": _floor,
    "cast": _cast,
    "dropout": _dropout,
    "view": _view,
    "clone": lambda scores, step: scores,
}
