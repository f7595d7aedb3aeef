"""Attend once, for the whole batch, to keys that all batch entries share.

    attention(q [b,h,t,d], cat([prefix.expand(b), own]), ...)
        =>  merge(attention_lse(q as [1,h,b*t,d], prefix), attention_lse(q, own))

Exact: parts of one softmax, joined by their log-sum-exp. A prefix is shared where the graph proves it: it is
expanded from one batch entry, or an input of stride 0. Every query must see all of it. Several such parts
(contexts read in parallel) are attended to once each. Inference only: no kernel gives gradients to a
log-sum-exp. No training needed. Saves reading the prefix `b - 1` times; its queries fill whole tiles.

Source: Juravsky et al. 2024, arXiv:2402.05099, section 3 (Hydragen); parallel contexts: Yang et al. 2025,
arXiv:2502.05431.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import scaled_dot_product_attention as attend

from effopt.graph.analyses import masks
from effopt.graph.analyses.key_segments import segments_of
from effopt.graph.attention_parts import Run, refuse_hidden, runs_of, saved_bytes, write
from effopt.graph.ops.attention import OPTIONS
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import shape_of
from effopt.passes.attention_pass import AttentionPass
from effopt.passes.base import Example


@dataclass(frozen=True)
class SplitSharedPrefix(AttentionPass):
    """Each attention over keys of several parts, of which the batch shares one."""

    name: ClassVar[str] = "split-shared-prefix"
    after: ClassVar[tuple[str, ...]] = ("recover-mask-structure", "prove-rows-see-key")

    def legal(self, m: Match) -> None:
        require(len(shape_of(m.q)) == 4, "", m.root)
        runs = m.once(_runs)
        some = "no part of the keys and values is proved to be the same for all batch entries"
        require(any(run.is_shared for run in runs), some, m.root)
        require(not statically_known_true(shape_of(m.q)[0] == 1), "the batch is 1: it shares nothing", m.root)
        require(not m.dropout_p, "dropout: the weights of all keys are dropped together", m.root)
        require(m.bias is None, "a bias, which may differ between batch entries and keys", m.root)
        hides = "ids, or first keys that a band does not mask, say which shared keys a query sees"
        require(m.query_ids is None and m.anchors is None and m.prefix is None, hides, m.root)
        high = 0 if m.is_causal and m.high is None else m.high
        refuse_hidden(runs, shape_of(m.q)[-2], m.low, high, m.root)
        require(not m.is_causal, "causal, and an offset: no kernel takes both", m.root)
        self._refuse_blind_rows(m, runs)
        saved, moved = saved_bytes(m.q, runs, m.mask)
        reason = f"reading the shared keys once saves {saved} bytes, and joining the parts moves {moved}"
        require(saved > moved, reason, m.root)
        require(not m.in_training, "training: no kernel here gives gradients to a log-sum-exp", m.root)

    def _refuse_blind_rows(self, m: Match, runs: tuple[Run, ...]) -> None:
        """A row without a key must give 0, as it does in parts, or not be there."""
        fill = -math.inf if m.fill is None else m.fill
        sees = m.rows_see_key or (m.mask is None and _has_key(runs))
        blind = "a row may see no key, and then does not give 0; use scaled_dot_product_attention"
        require(sees or (m.zero_masked_rows and fill == -math.inf), blind, m.root)
        near = f"masked scores become {fill:g}, which is not far below every score; fill with -inf"
        require(fill <= masks.MASKED, near, m.root)
        require(m.sinks is None or fill == -math.inf, f"sinks, and masked scores of {fill:g}", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        runs = m.once(_runs)
        mask = m.mask
        while mask is not None and len(shape_of(mask)) < 4:
            mask = emit(torch.ops.aten.unsqueeze.default, mask, 0)
        told = {name: m.captures[name] for name in OPTIONS} | {"mask": mask}
        saved, _ = saved_bytes(m.q, runs, mask)
        emit.note = f"{saved} bytes of keys and values less to read"
        return write(emit, m.q, runs, told)

    def samples(self) -> Iterable[Example]:
        q, prefix, own = torch.randn(4, 2, 1, 8), torch.randn(1, 2, 30, 8), torch.randn(4, 2, 5, 8)
        yield Example(_over_prefix, (q, prefix, own), training=False)
        yield Example(_over_prefix, (q, prefix.expand(4, -1, -1, -1), own), training=False)
        grouped = torch.randn(6, 4, 3, 8), torch.randn(1, 2, 100, 8), torch.randn(6, 2, 3, 8)
        yield Example(_causal_after_prefix, grouped, training=False)

        def two(q: torch.Tensor, one: torch.Tensor, other: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            k = torch.cat([one.expand(4, -1, -1, -1), own, other.expand(4, -1, -1, -1)], 2)
            return attend(q, k, k)

        yield Example(two, (q, prefix, torch.randn(1, 2, 63, 8), own), training=False)

    def refusals(self) -> Iterable[Example]:
        q, prefix, own = torch.randn(4, 2, 1, 8), torch.randn(1, 2, 30, 8), torch.randn(4, 2, 5, 8)
        batch = torch.randn(4, 2, 30, 8)
        yield Example(_over_prefix, (q, batch, own), "is proved to be the same", training=False)
        yield Example(_over_prefix, (q, prefix, own), "training: ", training=True)
        yield Example(_over_prefix, (q[:1], prefix, own[:1]), "the batch is 1", training=False)
        narrow = (q, prefix.bfloat16(), own)
        yield Example(_over_prefix, narrow, "parts of torch.bfloat16 and torch.float32", training=False)
        short = (q, prefix[:, :, :1], own)
        yield Example(_over_prefix, short, "joining the parts moves", training=False)
        inside = lambda q, p, own: attend(q, k := _joined(q, p, own), k, is_causal=True)  # noqa: E731
        yield Example(inside, (torch.randn(4, 2, 35, 8), prefix, own), "causal inside", training=False)
        biased = lambda q, p, own, x: attend(q, k := _joined(q, p, own), k, attn_mask=x)  # noqa: E731
        yield Example(biased, (q, prefix, own, torch.randn(4, 1, 1, 35)), "a bias", training=False)


def _joined(q: torch.Tensor, prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return torch.cat([prefix.expand(q.shape[0], -1, -1, -1), own], 2)


def _over_prefix(q: torch.Tensor, prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    k = _joined(q, prefix, own)
    return attend(q, k, k)


def _causal_after_prefix(q: torch.Tensor, prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    k = _joined(q, prefix, own)
    seen = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + prefix.shape[2]
    return attend(q, k, k, attn_mask=seen, enable_gqa=True)


def _runs(m: Match) -> tuple[Run, ...]:
    return runs_of(segments_of(m.k, m.v))


def _has_key(runs: tuple[Run, ...]) -> bool:
    """Whether there is a shared key: all queries see those."""
    return any(r.is_shared and statically_known_true(r.segments[0].length >= 1) for r in runs)
