"""Say by numbers and ids which keys a query sees, where the graph of the mask proves it.

    attention(q, k, v, mask=(key <= query) & (key > query - 8))      =>  attention(q, k, v, low=-7, high=0)
    attention(q, k, v, mask=document[query] == document[key])        =>  attention(.., query_ids, key_ids)
    attention(q, k, v, mask=(key <= query) & ((key < 4) | (key > query - 8)))
        =>  attention(q, k, v, low=-7, high=0, anchors=4)
    attention(q, k, v, bias=where(window & seen[key], 0, -inf) + alibi)
        =>  attention(q, k, v, low, high, mask=seen, bias=alibi)

Exact: `graph.analyses.masks` reads the mask as a function of batch, head, query and key. Windows, chunks,
documents (packed rows), anchors, prefixes and bounds from sizes (a cache that grows) are recovered; padding,
biases and what is not read stay tensors, without dimensions that they do not need. Rows that see no key keep
their fill. Values of inputs are not assumed: ids are read at run time. No training needed. Saves building and
reading a `[b, 1, t, s]` mask, and the scores outside of band and ids in kernels that skip them.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1 (windows); Krell et al. 2021, arXiv:2107.02027,
section 3.2 (packed rows).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from effopt.graph import ops
from effopt.graph.mask_structure import Plan, Told, plan, write
from effopt.graph.ops.attention import OPTIONS
from effopt.graph.rewrite import Emit, Match, require
from effopt.passes.attention_pass import AttentionPass
from effopt.passes.base import Example


@dataclass(frozen=True)
class RecoverMaskStructure(AttentionPass):
    """Each attention with a mask, or a bias that hides keys."""

    name: ClassVar[str] = "recover-mask-structure"
    after: ClassVar[tuple[str, ...]] = ("prove-causal",)

    def legal(self, m: Match) -> None:
        require(m.mask is not None or m.bias is not None, "", m.root)
        require(m.low is None and m.high is None and m.query_ids is None, "", m.root)
        found = m.once(_plan)
        hides = m.mask is None and found.fill is None
        require(not (hides and m.is_causal), "causal, and a bias that hides keys: a row may see none", m.root)
        # A bias gives a gradient to the scores of a row that it hides whole; a mask gives none.
        kept = m.mask is not None or found.rows_see_key or not m.in_training
        require(
            kept, "a row may see no key, and in training its scores get a gradient: the bias stays", m.root
        )

    def rewrite(self, emit: Emit, m: Match) -> Any:
        found = m.once(_plan)
        kept = {name: m.captures[name] for name in OPTIONS} | write(emit, found, m.q, m.k, m.mask)
        if kept["mask"] is None and found.told == Told():
            kept["fill"] = None
        kept["rows_see_key"] = found.rows_see_key and not m.is_causal
        emit.note = found.describe()
        bounds = {k: kept.pop(k) for k in ("low", "high") if kept[k] is not None}
        given = {k: v for k, v in kept.items() if v not in (None, False, 0.0)} | bounds
        return emit(ops.attention, m.q, m.k, m.v, **given)

    def samples(self) -> Iterable[Example]:
        q = torch.randn(2, 2, 6, 8)

        def window(q: torch.Tensor) -> torch.Tensor:
            at = torch.arange(q.shape[2])
            near = (at <= at[:, None]) & (at > at[:, None] - 3)
            return (q @ q.mT).masked_fill(~near, float("-inf")).softmax(-1) @ q

        def packed(q: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
            same = (document[:, :, None] == document[:, None, :])[:, None]
            return (q @ q.mT + torch.where(same, 0.0, -1e38)).softmax(-1) @ q

        def padded(q: torch.Tensor, seen: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
            at = torch.arange(q.shape[2])
            open_ = (at <= at[:, None]) & seen[:, None, None, :]
            alibi = slopes[:, None, None] * at
            return (q @ q.mT + alibi + torch.where(open_, 0.0, float("-inf"))).softmax(-1) @ q

        yield Example(window, (q,))
        yield Example(packed, (q, torch.tensor([[0, 0, 0, 1, 1, 1], [3, 3, 0, 0, 3, 3]])))
        seen = torch.arange(6) >= torch.tensor([[0], [2]])
        yield Example(padded, (q, seen, torch.rand(2)), training=False)

    def refusals(self) -> Iterable[Example]:
        q, keep = torch.randn(2, 2, 6, 8), torch.ones(6, 6, dtype=torch.bool).tril()
        masked = lambda q, keep: (q @ q.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ q  # noqa: E731
        yield Example(masked, (q, keep), "which is not read further")

        def biased(q: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return (q @ q.mT + bias).softmax(-1) @ q

        yield Example(biased, (q, torch.randn(2, 6, 6)), "hides no key by a number")

        def twice(q: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            at, lowest = torch.arange(q.shape[2]), -1e38
            first = torch.where(at <= at[:, None], 0.0, lowest)
            return (q @ q.mT + first + torch.where(seen, 0.0, lowest)).softmax(-1) @ q

        yield Example(twice, (q, torch.arange(6) > 2), "the sum of its biases decides")


def _plan(m: Match) -> Plan:
    return plan(m.q, m.k, m.mask, m.bias)
