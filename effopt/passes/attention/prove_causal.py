"""Drop a mask that is proved causal, and keep the fact.

    attention(q, k, v, mask=tril) or (bias=where(tril, 0, -inf))  =>  attention(q, k, v, is_causal=True)

Exact: with a key in every row, as a causal mask has, a fill of -inf and one of finfo.min give the same
weights. The proof is `graph.analyses.masks`; a mask that comes from an input stays a tensor. No training
needed. Saves reading a `[t, s]` mask, and half of the scores in kernels that skip what is masked.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3; Dao et al. 2022, arXiv:2205.14135, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from effopt.graph import ops
from effopt.graph.analyses import masks
from effopt.graph.ops.attention import OPTIONS
from effopt.graph.rewrite import Emit, Match, require
from effopt.passes.attention_pass import AttentionPass
from effopt.passes.base import Example

_MASKED = -1e30


@dataclass(frozen=True)
class ProveCausal(AttentionPass):
    """One mask or bias of an attention, if it is causal."""

    name: ClassVar[str] = "prove-causal"

    def legal(self, m: Match) -> None:
        require(not m.is_causal, "", m.root)
        require(m.low is None and m.high is None and m.query_ids is None, "", m.root)
        require(m.mask is not None or m.bias is not None, "", m.root)
        require(m.sinks is None or m.mask is None or not _finite(m.fill), "sinks, and a finite fill", m.root)
        operand = m.bias if m.mask is None else m.mask
        require(
            _causal_operand(m) is not None,
            "" if not masks.is_mask(operand) else "no mask is proved causal from the graph",
            m.root,
        )

    def rewrite(self, emit: Emit, m: Match) -> Any:
        kept = {name: m.captures[name] for name in OPTIONS}
        kept |= {str(_causal_operand(m)): None, "is_causal": True}
        if kept["mask"] is None:
            kept["fill"] = None
        kept["rows_see_key"] = kept["mask"] is None and kept["bias"] is None
        return emit(
            ops.attention, m.q, m.k, m.v, **{k: v for k, v in kept.items() if v not in (None, False, 0.0)}
        )

    def samples(self) -> Iterable[Example]:
        q = torch.randn(2, 2, 6, 8)

        def added(q: torch.Tensor) -> torch.Tensor:
            mask = torch.full((6, 6), float("-inf")).triu(1)
            return (q @ q.mT + mask).softmax(-1) @ q

        def compared(q: torch.Tensor) -> torch.Tensor:
            at = torch.arange(q.shape[2])
            return torch.where(at <= at[:, None], q @ q.mT, -1e30).softmax(-1) @ q

        yield Example(added, (q,))
        yield Example(compared, (q,))

    def refusals(self) -> Iterable[Example]:
        q, keep = torch.randn(2, 2, 6, 8), torch.ones(6, 6, dtype=torch.bool).tril()
        masked = lambda q, keep: (q @ q.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ q  # noqa: E731
        yield Example(masked, (q, keep), "no mask is proved causal")

        def window(q: torch.Tensor) -> torch.Tensor:
            at = torch.arange(q.shape[2])
            near = (at <= at[:, None]) & (at > at[:, None] - 3)
            return (q @ q.mT).masked_fill(~near, float("-inf")).softmax(-1) @ q

        yield Example(window, (q,), "no mask is proved causal")


def _finite(fill: float | None) -> bool:
    return fill is not None and math.isfinite(fill)


def _causal_operand(m: Match) -> str | None:
    """`mask` or `bias`, if it is the only one and it is causal."""
    if m.mask is not None:
        masks_out = m.fill is None or m.fill <= _MASKED
        # A further bias could itself hide the keys that the finite fill leaves to a row.
        alone = m.bias is None or not _finite(m.fill)
        return "mask" if masks_out and alone and masks.is_causal(m.mask) else None
    return "bias" if masks.is_causal(m.bias) else None
