"""Attend within the rows or columns of a grid one by one, where the mask lets nothing else be seen.

    attention(q [b,h,t,d], k, v, mask = key // w == query // w)
        =>  attention(q [b*t/w,h,w,d], k, v)                      rows, or chunks of w positions
    attention(q, k, v, mask = key % w == query % w)
        =>  attention(q [b*w,h,t/w,d], k, v)                      columns

Exact: masked keys have weight 0 and every position sees itself. A causal mask beside it stays causal within
each line. Both hold for training. No training needed. Saves the mask, and of t * t scores all but t * w (or
t * t/w): no block of keys is read for its edge alone. Columns are laid out anew, four tensors once each.

Source: Ho et al. 2019, arXiv:1912.12180 (axial attention); chunks: Child et al. 2019,
arXiv:1904.10509, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses import masks
from effopt.graph.analyses.mask_axes import Lines, lines_of
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import shape_of
from effopt.passes.attention_pass import AttentionPass
from effopt.passes.base import Example

_aten = torch.ops.aten


@dataclass(frozen=True)
class SplitAttentionByAxis(AttentionPass):
    """Each attention whose one mask or bias is proved to be the lines of a grid."""

    name: ClassVar[str] = "split-attention-by-axis"
    after: ClassVar[tuple[str, ...]] = ("prove-causal",)

    def legal(self, m: Match) -> None:
        require((m.mask is None) != (m.bias is None), "", m.root)
        lines = m.once(_lines)
        require(len(shape_of(m.q)) == 4, "no batch and heads: 4 dimensions are divided into lines", m.root)
        static = all(type(n) is int for x in (m.q, m.k, m.v) for n in shape_of(x)[1:])
        require(static, "heads or head sizes are symbolic", m.root)
        told = any(x is not None for x in (m.low, m.high, m.query_ids, m.anchors, m.prefix))
        require(not told, "a band or ids, besides the mask", m.root)
        require(not m.dropout_p, "dropout: which weights it drops hangs on the shape", m.root)
        near = f"masked scores become {m.fill}, which is not far below every score; fill with -inf"
        require(m.fill is None or m.fill <= masks.MASKED, near, m.root)
        require(m.sinks is None or m.bias is None, "sinks, and a bias that hides keys", m.root)
        require(lines.length > 1, f"lines of {lines.length} position", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        lines = m.once(_lines)
        kept = {n: m.captures[n] for n in ("scale", "softcap", "sinks") if m.captures[n] is not None}
        kept |= {"is_causal": True} if lines.is_causal or m.is_causal else {}
        kept |= {"rows_see_key": True}
        query, key, value = (_divided(emit, x, lines) for x in (m.q, m.k, m.v))
        out = emit(ops.attention, query, key, value, **{n: x for n, x in kept.items() if x != 0.0})
        kind = "columns" if lines.are_columns else "rows"
        emit.note = f"{kind} of {lines.length} positions: {lines.t * lines.t} scores become "
        emit.note += f"{lines.t * lines.length}"
        return _joined(emit, out, lines)

    def samples(self) -> Iterable[Example]:
        q = torch.randn(2, 2, 12, 8)
        yield Example(_attending(lambda at: at // 4 == at[:, None] // 4), (q,))
        yield Example(_attending(lambda at: at % 4 == at[:, None] % 4), (q,))
        causal = _attending(lambda at: (at // 3 == at[:, None] // 3) & (at <= at[:, None]))
        yield Example(causal, (q,))
        yield Example(_attending(lambda at: (at % 6 == at[:, None] % 6) & (at <= at[:, None])), (q,))

    def refusals(self) -> Iterable[Example]:
        q = torch.randn(2, 2, 12, 8)
        off_by_one = _attending(lambda at: (at + 1) // 4 == at[:, None] // 4)
        yield Example(off_by_one, (q,), "counted from 0")
        yield Example(_attending(lambda at: at // 5 == at[:, None] // 5), (q,), "not whole rows of 5")
        two = _attending(lambda at: at // 4 == at[:, None] // 3)
        yield Example(two, (q,), "counted from 0")
        near = _attending(lambda at: (at // 6 == at[:, None] // 6) & (at > at[:, None] - 2))
        yield Example(near, (q,), "only causality is kept")

        def packed(q: Tensor, document: Tensor) -> Tensor:
            same = document[:, None] == document
            return (q @ q.mT).masked_fill(~same, -torch.inf).softmax(-1) @ q

        yield Example(packed, (q, torch.arange(12) // 4), "counted from 0")


def _attending(keep: Any) -> Any:
    def attend(q: Tensor) -> Tensor:
        seen = keep(torch.arange(q.shape[2]))
        return (q @ q.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ q

    return attend


def _lines(m: Match) -> Lines:
    return lines_of(m.bias if m.mask is None else m.mask, shape_of(m.q)[-2], shape_of(m.k)[-2])


def _divided(emit: Emit, node: Node, lines: Lines) -> Node:
    """`[b * lines, h, length, d]` of `[b, h, t, d]`."""
    _, h, _, d = shape_of(node)
    grid = emit(_aten.reshape.default, node, [-1, h, lines.t // lines.width, lines.width, d])
    turned = emit(_aten.permute.default, grid, [0, 3, 1, 2, 4] if lines.are_columns else [0, 2, 1, 3, 4])
    return emit(_aten.reshape.default, turned, [-1, h, lines.length, d])


def _joined(emit: Emit, node: Node, lines: Lines) -> Node:
    """`[b, h, t, d]` of `[b * lines, h, length, d]`."""
    _, h, _, d = shape_of(node)
    grid = emit(_aten.reshape.default, node, [-1, lines.t // lines.length, h, lines.length, d])
    turned = emit(_aten.permute.default, grid, [0, 2, 3, 1, 4] if lines.are_columns else [0, 2, 1, 3, 4])
    return emit(_aten.reshape.default, turned, [-1, h, lines.t, d])
