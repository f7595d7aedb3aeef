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

from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.masks.least_number import least_number
from effopt.graph.analyses.row_maximum import is_row_maximum
from effopt.graph.analyses.score_formula import ABSORBING, Scores, Term
from effopt.graph.analyses.score_frames import in_frame, reshaped
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
    reframed = scores.frame_args or scores.split
    plain = not (scores.terms or scores.masks or scores.softcap or reframed)
    require(
        plain, "a tensor scales the scores after a mask, bias, soft-cap or reshape was applied", step.node
    )
    require(len(sizes) <= len(shape_of(step.node)), "a scale adds dimensions to the scores", step.node)
    op = step.node.target
    return replace(scores, factors=(*scores.factors, (op, factor)))


def _tanh(scores: Scores, step: Step) -> Scores:
    plain = not (scores.terms or scores.masks or scores.softcap)
    require(plain, "tanh of scores that already have a mask, bias or soft-cap", step.node)
    require(not scores.shifted, "tanh of scores from which their row maximum is subtracted", step.node)
    return replace(scores, softcap=1.0)


def _add(scores: Scores, step: Step) -> Scores:
    return _plus(scores, step, 1.0)


def _sub(scores: Scores, step: Step) -> Scores:
    return _plus(scores, step, -1.0)


def _shift(scores: Scores, step: Step) -> Scores:
    require(scores.split is None, "a maximum is subtracted while rows or keys are split", step.node)
    require(is_row_maximum(step.peak, _inner(step)), "a maximum over something else is subtracted", step.node)
    return replace(scores, shifted=True)


def _plus(scores: Scores, step: Step, sign: float) -> Scores:
    number = constant_number(step.term)
    if number == 0:
        return scores
    require(isinstance(step.term, Node), "a number is added to all scores", step.node)
    if not isinstance(val(step.term), torch.Tensor):
        require(False, "a symbolic number is added to all scores", step.node)
    require(val(step.term).dtype != torch.bool, "a boolean tensor is added to the scores", step.node)
    scores = _masks_as_terms(scores, step.node)
    term = in_frame(Term(step.term, sign), scores, step.node)
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
    absorbs = fill <= ABSORBING or not scores.shifted
    reason = f"masked scores become {fill} beside others from which the row maximum is subtracted"
    require(absorbs, f"{reason}; mask before that, or with -inf", step.node)
    condition, inverted = _strip_not(condition, inverted)
    mask = in_frame(Term(condition, inverted=inverted), scores, step.node)
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


def _zeroed(scores: Scores, step: Step) -> Scores:
    """Weights set to 0 where their scores are masked: that changes rows which see no key, and no other."""
    condition, inverted = (step.seen, False) if step.hidden is None else (step.hidden, True)
    condition, inverted = _strip_not(condition, inverted)
    mask = Term(condition, inverted=inverted)
    require(scores.masks == (mask,), "weights become 0 by another mask than that of their scores", step.node)
    weights: Any = step.node.args[1 if step.hidden is None else 0]
    unmoved = equal(shape_of(weights), shape_of(step.node)) and equal(scores.frame, scores.widest)
    require(unmoved, "weights become 0 in another shape than that in which scores are masked", step.node)
    fill = scores.fill or 0.0
    require(
        fill <= ABSORBING,
        f"masked scores are {fill}, which is not so low that their weights are 0 before they become that",
        step.node,
    )
    return replace(scores, fill=-math.inf, zeroed=True)


def _cast(scores: Scores, step: Step) -> Scores:
    require(val(step.node).dtype.is_floating_point, "the scores are cast to an integer type", step.node)
    return scores


def _dropout(scores: Scores, step: Step) -> Scores:
    require(not step.train or step.p == 0, "dropout on the scores, before softmax", step.node)
    return scores


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
    "zeroed": _zeroed,
    "cast": _cast,
    "dropout": _dropout,
    "view": reshaped,
    "clone": lambda scores, step: scores,
}
