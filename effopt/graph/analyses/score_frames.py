"""How views merge and split the dimensions of attention scores, and what is added to them there.

    [b * h, t, s] -> [b, h, t, s]                 heads come apart: the wider frame is that of the attention
    [b * w, h, t, s] -> [b, w, h, t, s] -> back   a batch of windows, split for the mask of each window
    [n, y * x, y * x] -> [n, y, x, y, x] -> back  rows and keys of a grid, split for a bias of each axis

Looks only; what a mask or bias must be reshaped to is kept in its `Term`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.heads import broadcasts, equal
from effopt.graph.analyses.score_formula import Scores, Shape, Split, Term
from effopt.graph.pattern import Step
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of


def reshaped(scores: Scores, step: Step) -> Scores:
    """The formula after a view of the scores. Raises `Reject` where rows or keys move."""
    inner: Any = step.node.args[0]
    before, after = shape_of(inner), shape_of(step.node)
    require(
        len(before) >= 2 and len(after) >= 2, "the scores are reshaped to fewer than 2 dimensions", step.node
    )
    if scores.split is not None:
        before = _joined(before, scores.split)
        scores = replace(scores, split=None)
    split = _split(scores, before, after, step)
    if split is not None:
        return replace(scores, split=split)
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


def _joined(sizes: Shape, split: Split) -> Shape:
    """The sizes that `sizes` were split from."""
    return tuple(math.prod(part) for part in _parts(sizes, split.counts))


def _parts(sizes: Sequence[Any], counts: Sequence[int]) -> list[Sequence[Any]]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [sizes[end - n : end] for n, end in zip(counts, ends, strict=True)]


def _split(scores: Scores, before: Shape, after: Shape, step: Step) -> Split | None:
    """How `after` splits dimensions of `before` that must be joined again before softmax, if it does."""
    if equal(before[-2:], after[-2:]):
        # Heads that come apart stay so. A batch beside heads is joined again, as the result shows.
        counts = _counts(before[:1], after[: 1 - len(before)]) if len(before) > 3 else None
        whole = equal(before[1:], after[1 - len(before) :])
        if counts is None or counts[0] == 1 or not (whole and scores.batch_may_split):
            return None
        counts = (*counts, *(1 for _ in before[1:]))
    else:
        counts = _counts(before, after)
    if counts is None:
        return None
    sizes = tuple(n if isinstance(n, int) else arg for n, arg in zip(after, step.sizes, strict=True))
    return Split(counts, sizes) if -1 not in sizes else None


def _counts(whole: Shape, parts: Shape) -> tuple[int, ...] | None:
    """How many of `parts` make up each of `whole`, in order; None if they do not, or it is not known."""
    counts: list[int] = []
    at = 0
    for size in whole:
        start, product = at, 1
        while at < len(parts) and not (at > start and statically_known_true(product == size)):
            product = product * parts[at]
            at += 1
        if not statically_known_true(product == size):
            return None
        counts.append(at - start)
    return tuple(counts) if at == len(parts) and min(counts, default=0) else None


def _sizes(term: Term) -> Shape:
    """Of a term, joined where it was added to split scores."""
    return shape_of(term.node) if term.joined is None else term.joined[1]


def _to_frame(term: Term, scores: Scores, lead: Shape, where: Node) -> Term:
    sizes = _sizes(term)[:-2]
    if all(statically_known_true(s == 1) for s in sizes):
        return term
    return replace(term, lead=_full(sizes, scores.frame, lead, where))


def in_frame(term: Term, scores: Scores, where: Node) -> Term:
    """A term at the present frame, brought to the widest one. Raises `Reject` where that has no one shape."""
    own, total = shape_of(term.node), shape_of(where)
    require(
        broadcasts(own, total),
        f"a mask or bias {list(own)} does not broadcast to the scores {list(total)}",
        where,
    )
    if scores.split is not None:
        total = _joined(total, scores.split)
        term = _of_whole(term, scores.split, where)
    require(equal(total[:-2], scores.frame), f"a mask or bias enlarges the scores to {list(total)}", where)
    sizes = _sizes(term)[:-2]
    if len(scores.widest) == len(scores.frame) or all(statically_known_true(s == 1) for s in sizes):
        return term
    return replace(term, lead=_full(sizes, scores.frame, scores.frame_args or scores.widest, where))


def _full(sizes: Shape, frame: Shape, lead: Shape, where: Node) -> Shape:
    reason = "a mask or bias broadcasts over merged batch and head dimensions; apply it in 4-D"
    require(equal(sizes, frame), reason, where)
    require(not any(isinstance(s, torch.SymInt) for s in lead), reason, where)
    return lead


def _of_whole(term: Term, split: Split, where: Node) -> Term:
    """A term of split scores as one of the whole ones: repeated along what it broadcasts over, and joined."""
    own = shape_of(term.node)
    own = (1,) * (len(split.sizes) - len(own)) + tuple(own)
    spread: list[Any] = []
    joined: list[Any] = []
    for mine, full in zip(_parts(own, split.counts), _parts(split.sizes, split.counts), strict=True):
        if all(statically_known_true(n == 1) for n in mine):
            spread += [1] * len(mine)
            joined.append(1)
        else:
            spread += full
            joined.append(math.prod(full) if all(isinstance(n, int) for n in full) else -1)
    reason = "a mask or bias is added to scores of which two symbolic sizes are split"
    require(joined.count(-1) <= 1, reason, where)
    return replace(term, joined=(tuple(spread), tuple(joined)))
