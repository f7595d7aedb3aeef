"""Recognise attention, however its scores are scaled, capped, biased and masked.

    dropout(softmax(mask(softcap(scale * query @ key^T) + bias))) @ value  =>  attention(query, key, value, ...)

Exact up to reassociation and intermediate rounding (the op keeps scores in float32). Rows that see no
key keep the result of the original: NaN for -inf, uniform for a finite fill. No training needed. Saves
the round trips of the `[b, h, t, s]` scores through memory wherever a kernel takes the op.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped queries: Ainslie et al. 2023,
arXiv:2305.13245, section 2.2; sinks: Xiao et al. 2023, arXiv:2309.17453, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses.attention_form import AttentionForm, read
from effopt.graph.pattern import ANY, HOLE, Capture, OpBuilder, any_of, chain, number, tensor
from effopt.graph.rewrite import Emit, Match
from effopt.passes.base import Example, Rewrite, Stage


@dataclass(frozen=True)
class RecognizeAttention(Rewrite):
    """Every spelling over matmul or bmm becomes `effopt::attention`."""

    name: ClassVar[str] = "recognize-attention"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    after: ClassVar[tuple[str, ...]] = ("spell-einsum", "spell-softmax")
    may_duplicate: ClassVar[bool] = False

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (torch.ops.aten.softmax.int,)

    def pattern(self, op: OpBuilder, query: Any, key: Any, value: Any) -> Any:  # type: ignore[override]
        product = any_of(
            op.matmul(tensor(query), tensor(key)),
            op.bmm(tensor(query), tensor(key)),
            op.baddbmm(tensor("added"), tensor(query), tensor(key), beta=number("beta"), alpha=number("alpha")),
        )
        scores = chain("steps", product, **_score_steps(op))
        sunk = chain(
            "outer", op.cat([scores, tensor("sinks")], Capture("sink_dim")), **_shift(op), cast=_cast(op)
        )
        probabilities = any_of(
            _softmax(op, scores), op.slice(_softmax(op, sunk), -1, 0, Capture("kept"))
        )
        weights = chain("after", probabilities, **_weight_steps(op))
        return any_of(op.matmul(weights, tensor(value)), op.bmm(weights, tensor(value)))

    def legal(self, m: Match) -> None:
        read(m)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return _write(emit, read(m))
