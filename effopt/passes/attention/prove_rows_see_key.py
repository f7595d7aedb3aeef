"""Note that no row of an attention's mask hides every key.

    attention(q, k, v, mask=window)  =>  attention(q, k, v, mask=window, rows_see_key=True)

Exact: the value does not change; kernels that give 0 for a row without keys need not restore NaN. The
proof is `graph.analyses.masks`: an added bias that cannot reach -inf, a band that holds the diagonal, or
a mask that depends on no input. No training needed. Saves a pass over the mask and one over the result.

Source: Dao et al. 2022, arXiv:2205.14135, section 3.1 (the row maximum that such a row has not).
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class ProveRowsSeeKey(AttentionPass):
    """Each attention whose one mask or bias leaves a key to every row."""

    name: ClassVar[str] = "prove-rows-see-key"
    after: ClassVar[tuple[str, ...]] = ("prove-causal", "recover-mask-structure")

    def legal(self, m: Match) -> None:
        masked = m.mask is not None or m.bias is not None
        cares = masked and not m.rows_see_key and not m.zero_masked_rows
        require(cares, "", m.root)
        require(m.low is None and m.high is None and m.query_ids is None, "", m.root)
        require(
            m.mask is None or m.bias is None,
            "both a mask and a bias: they could hide all keys together",
            m.root,
        )
        require(not m.is_causal, "causal, and a mask: they could hide all keys together", m.root)
        operand = m.bias if m.mask is None else m.mask
        proved = masks.every_row_sees(operand)
        reason = "the mask comes from an input: a row of it may hide every key"
        require(proved, reason if masks.is_mask(operand) else "", operand)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        kept = {name: m.captures[name] for name in OPTIONS} | {"rows_see_key": True}
        return emit(
            ops.attention, m.q, m.k, m.v, **{k: v for k, v in kept.items() if v not in (None, False, 0.0)}
        )

    def samples(self) -> Iterable[Example]:
        q = torch.randn(2, 2, 6, 8)

        def curved(q: torch.Tensor) -> torch.Tensor:
            at = torch.arange(q.shape[2])
            seen = at * at <= at[:, None]
            return (q @ q.mT).masked_fill(~seen, float("-inf")).softmax(-1) @ q

        def finite(q: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return (q @ q.mT + torch.where(keep, 0.0, -1e30)).softmax(-1) @ q

        yield Example(curved, (q,))
        yield Example(finite, (q, torch.rand(6, 6) > 0.5))

    def refusals(self) -> Iterable[Example]:
        q, keep = torch.randn(2, 2, 6, 8), torch.ones(6, 6, dtype=torch.bool).tril()
        masked = lambda q, keep: (q @ q.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ q  # noqa: E731
        yield Example(masked, (q, keep), "a row of it may hide every key")
