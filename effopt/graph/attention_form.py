"""Attention as it was read from a match, and the one op that is written for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses import heads
from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.row_maximum import is_row_maximum
from effopt.graph.analyses.score_formula import Scores, Term
from effopt.graph.analyses.score_terms import fold
from effopt.graph.constants import guarded_number
from effopt.graph.pattern import Step
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten
_EXPANSIONS = (*heads.VIEWS, _aten.expand.default, _aten.unsqueeze.default)
SAFE_SOFTMAX = 2
"""Position of `_safe_softmax` among the softmax alternatives: it gives 0 where every key is masked."""


@dataclass(frozen=True)
class AttentionForm:
    """What one match means. `key` is transposed still: `[..., d, s]`."""

    query: Node
    key: Node
    value: Node
    scores: Scores
    dropout_p: float
    sinks: Node | None
    zero_masked_rows: bool
    root: Node


def read(m: Match) -> AttentionForm:
    """The attention that a match of the recognition pattern computes. Raises `Reject`."""
    for operand in (m.query, m.key, m.value):
        require(is_floating(operand), f"{operand.name} is not a real floating-point tensor", operand)
    ranks = {len(shape_of(n)) for n in (m.query, m.key, m.product)}
    require(
        len(ranks) == 1,
        "query and key have different ranks: a shared matrix, not keys of each batch entry",
        m.product,
    )
    start = _product(m)
    scores = fold(start, m.steps)
    keys_whole = scores.split is None or scores.split.counts[-1] == 1
    require(keys_whole, "softmax is taken over a part of the keys, which a view has split", m.root)
    scores = fold(scores, [s for s in m.after if s.tag not in ("dropout", "native")])
    require(scores.split is None, "weights whose rows or keys a view has split meet the value", m.root)
    value_rank = len(shape_of(m.value))
    require(
        value_rank == len(shape_of(m.root)),
        "the value is shared by the whole batch: a matrix, not values",
        m.value,
    )
    for operand in (m.value, *(t.node for t in (*scores.terms, *scores.masks))):
        require(
            operand not in m.nodes, f"{operand.name} is both a step of the attention and an operand", operand
        )
    for step in m.outer or ():
        shifts = step.tag != "shift" or is_row_maximum(step.peak, step.node.args[0])
        require(shifts, "something else than the row maximum is subtracted before softmax", step.node)
    sinks = _sinks_of(m, scores) if m.sinks is not None else None
    require(not (sinks and scores.zeroed), "weights beside a sink become 0 where they are masked", m.root)
    zeroed = scores.zeroed or m.softmax_kind == SAFE_SOFTMAX
    return AttentionForm(m.query, m.key, m.value, scores, _dropout_p(m.after), sinks, zeroed, m.root)


def _product(m: Match) -> Scores:
    """The formula of `query @ key^T`, before any step. Raises `Reject`."""
    frame = shape_of(m.product)[:-2]
    require(equal(shape_of(m.query)[:-2], frame), f"the query is broadcast over {list(frame)}", m.query)
    alpha, beta = (guarded_number(1.0 if x is None else x) for x in (m.alpha, m.beta))
    require(
        alpha is not None and beta is not None,
        "the factors of baddbmm are not known when compiling",
        m.product,
    )
    splits = len(shape_of(m.root)) == len(shape_of(m.product))
    start = Scores(scale=float(alpha or 0.0), frame=frame, widest=frame, batch_may_split=splits)
    if m.added is not None and beta:
        require(
            heads.broadcasts(shape_of(m.added), shape_of(m.product)),
            "the added bias does not broadcast",
            m.added,
        )
        start = replace(start, terms=(Term(m.added, float(beta)),))
    return start


def _dropout_p(steps: tuple[Step, ...]) -> float:
    live = [float(s.p) for s in steps if s.tag in ("dropout", "native") and s.train and s.p]
    require(len(live) <= 1, "dropout is applied twice to the weights")
    return live[0] if live else 0.0


def _sinks_of(m: Match, scores: Scores) -> Node:
    """The `[h]` (or `[1, h, 1, 1]`) logits behind the extra column."""
    keys, columns = shape_of(m.product)[-1], shape_of(m.sinks)
    last = m.sink_dim in (-1, len(columns) - 1)
    require(
        last and len(columns) == 4 and columns[-1] == 1,
        "the extra logits are not one column of keys",
        m.sinks,
    )
    ends = m.kept == -1 or equal((val(m.kept),), (keys,))
    require(ends, "what is sliced off after softmax is not the extra column", m.root)
    node: Node = m.sinks
    while node.target in _EXPANSIONS and len(shape_of(node)) == 4 and len(shape_of(node.args[0])) in (1, 4):
        node = node.args[0]  # type: ignore[assignment]
    own = shape_of(node)
    head_count = scores.widest[1] if len(scores.widest) == 2 else None
    plain = equal(own, (head_count,)) or equal(own, (1, head_count, 1, 1))
    require(plain, f"the extra logits {list(own)} differ between batch entries or queries", m.sinks)
    return node


def write(emit: Emit, form: AttentionForm) -> Node:
    """Emit the canonical op and what brings its operands and result to shape."""
    scores = form.scores
    query, by_query = heads.without_factor(form.query)
    for op, factor in scores.factors:
        query = emit(op, query, factor)
    key, by_key = _key(emit, form.key)
    query, key, value = (_in_frame(emit, x, scores) for x in (query, key, form.value))
    key, value = grouped(emit, query, key, value)
    dtype = torch.promote_types(torch.promote_types(val(query).dtype, val(key).dtype), val(value).dtype)
    query, key, value = (emit.cast(x, dtype) for x in (query, key, value))
    scale = scores.scale * by_query * by_key
    out = emit(ops.attention, query, key, value, scale=scale, **_options(emit, form, dtype))
    if len(shape_of(out)) != len(shape_of(form.root)):
        out = emit(_aten.reshape.default, out, [-1, _size(emit, query, -2), _size(emit, value, -1)])
    return emit.cast(out, val(form.root).dtype)


def _options(emit: Emit, form: AttentionForm, dtype: torch.dtype) -> dict[str, Any]:
    """What the op is told beside its operands and its scale."""
    scores = form.scores
    kwargs: dict[str, Any] = {}
    kwargs |= {"softcap": scores.softcap} if scores.softcap else {}
    kwargs |= {"bias": _bias(emit, scores.terms, dtype)} if scores.terms else {}
    kwargs |= {"mask": _mask(emit, scores.masks), "fill": scores.fill} if scores.masks else {}
    kwargs |= {"dropout_p": form.dropout_p} if form.dropout_p else {}
    kwargs |= {"zero_masked_rows": True} if form.zero_masked_rows else {}
    if form.sinks is not None:
        flat = len(shape_of(form.sinks)) == 1
        kwargs["sinks"] = form.sinks if flat else emit(_aten.view.default, form.sinks, [-1])
    return kwargs


def _key(emit: Emit, node: Node) -> tuple[Node, float]:
    """`[..., s, d]` from `[..., d, s]`, and the number that it is multiplied by."""
    node, outer = heads.without_factor(node)
    source = heads.transposed_source(node)
    if source is None:
        return emit(_aten.transpose.int, node, -2, -1), outer
    source, inner = heads.without_factor(source)
    return source, outer * inner


def _size(emit: Emit, node: Node, dim: int) -> Any:
    size = shape_of(node)[dim]
    return size if isinstance(size, int) else emit(_aten.sym_size.int, node, dim % len(shape_of(node)))


def _in_frame(emit: Emit, node: Node, scores: Scores) -> Node:
    """With batch and heads as separate dimensions if the scores had them so at some step."""
    if scores.frame_args is None or len(shape_of(node)) == len(scores.widest) + 2:
        return node
    source = heads.before_merge(node, scores.widest)
    sizes = [*scores.frame_args, _size(emit, node, -2), _size(emit, node, -1)]
    return source if source is not None else emit(_aten.reshape.default, node, sizes)


def grouped(emit: Emit, query: Node, key: Node, value: Node) -> tuple[Node, Node]:
    """Key and value as the op takes them: KV heads not repeated, other dimensions as the query's."""
    short_key, short_value = heads.unrepeated(key), heads.unrepeated(value)
    if _groups(query, short_key, short_value):
        return short_key, short_value
    if _groups(query, key, value):
        return key, value
    return _expanded(emit, key, query), _expanded(emit, value, query)


def _groups(query: Node, key: Node, value: Node) -> bool:
    q, k, v = shape_of(query), shape_of(key), shape_of(value)
    # There are as many values as keys, or the original fails too; in a growing cache their symbols differ.
    if not equal(k[:-2], v[:-2]) or len(q) != len(k):
        return False
    if len(q) != 4:
        return equal(q[:-2], k[:-2])
    whole = isinstance(q[1], int) and isinstance(k[1], int) and k[1] > 0 and q[1] % k[1] == 0
    return whole and equal(q[:1], k[:1])


def _expanded(emit: Emit, node: Node, query: Node) -> Node:
    rank = len(shape_of(query))
    own, wanted = shape_of(node)[:-2], shape_of(query)[:-2]
    if equal(own, wanted):
        return node
    require(
        heads.broadcasts(own, wanted),
        f"key or value has batch and heads {list(own)}, the query {list(wanted)}",
        node,
    )
    return emit(_aten.expand.default, node, [*(_size(emit, query, i) for i in range(rank - 2)), -1, -1])


def _bias(emit: Emit, terms: tuple[Term, ...], dtype: torch.dtype) -> Node:
    total: Node | None = None
    for term in terms:
        node = term.node
        if term.fill is not None:
            zero = emit(_aten.new_zeros.default, node, [], dtype=dtype)
            keep = emit(_aten.logical_not.default, node) if term.inverted else node
            node = emit(_aten.where.ScalarOther, keep, zero, term.fill)
        if not val(node).dtype.is_floating_point:
            node = emit(_aten._to_copy.default, node, dtype=dtype)
        node = _reshaped(emit, node, term)
        if term.coefficient != 1.0:
            node = emit(_aten.mul.Tensor, node, term.coefficient)
        total = node if total is None else emit(_aten.add.Tensor, total, node)
    assert total is not None
    return total


def _mask(emit: Emit, masks: tuple[Term, ...]) -> Node:
    total: Node | None = None
    for mask in masks:
        node = _reshaped(emit, mask.node, mask)
        if mask.inverted:
            node = emit(_aten.logical_not.default, node)
        total = node if total is None else emit(_aten.logical_and.default, total, node)
    assert total is not None
    return total


def _reshaped(emit: Emit, node: Node, term: Term) -> Node:
    if term.joined is not None:
        spread, sizes = (list(x) for x in term.joined)
        node = emit(_aten.expand.default, node, spread)
        node = emit(_aten.reshape.default, node, sizes)
    if term.lead is None:
        return node
    tail = [_size(emit, node, d) for d in (-2, -1)[-min(2, len(shape_of(node))) :]]
    return emit(_aten.reshape.default, node, [*term.lead, *tail])
