"""Take an existing `scaled_dot_product_attention` call as the canonical op.

    scaled_dot_product_attention(q, k, v, mask, p, is_causal, scale)  =>  attention(q, k, v, ...)

Exact. Rows that see no key give 0, as every SDPA kernel does for boolean and for -inf masks alike
(torch 2.13, CPU: flash and math, float32 and bfloat16). No training needed. Saves the copies of
repeated KV heads, and lets the passes over attention see the call.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped queries: Ainslie et al. 2023,
arXiv:2305.13245, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from effopt.graph import ops
from effopt.graph.analyses.heads import broadcasts
from effopt.graph.attention_form import grouped
from effopt.graph.constants import guarded_number
from effopt.graph.pattern import OpBuilder, tensor
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import is_floating, shape_of, val
from effopt.passes.base import Example, Rewrite, Stage


@dataclass(frozen=True)
class RecognizeSDPACall(Rewrite):
    """A library call becomes `effopt::attention`."""

    name: ClassVar[str] = "recognize-sdpa-call"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (torch.ops.aten.scaled_dot_product_attention.default,)

    def pattern(
        self, op: OpBuilder, q: Any, k: Any, v: Any, mask: Any, p: Any, causal: Any, scale: Any, grouped: Any
    ) -> Any:
        operands = (tensor(q), tensor(k), tensor(v))
        return op.scaled_dot_product_attention(*operands, mask, p, causal, scale=scale, enable_gqa=grouped)

    def legal(self, m: Match) -> None:
        q, k, v = shape_of(m.q), shape_of(m.k), shape_of(m.v)
        for operand in (m.q, m.k, m.v):
            require(is_floating(operand), f"{operand.name} is not a real floating-point tensor", operand)
        require(len(q) == len(k) == len(v), "query, key and value have different ranks", m.root)
        require(
            m.scale is None or guarded_number(m.scale) is not None,
            "the scale is not known when compiling",
            m.root,
        )
        require(not (m.causal and m.mask is not None), "both is_causal and a mask", m.root)
        if m.mask is not None:
            fits = broadcasts(shape_of(m.mask), (*q[:-1], k[-2]))
            require(fits, "the mask does not broadcast to the scores, or enlarges them", m.mask)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        query = m.q
        key, value = (m.k, m.v) if m.grouped else grouped(emit, query, m.k, m.v)
        d = shape_of(query)[-1]
        scale = 1.0 if m.scale is None else float(guarded_number(m.scale) or 0.0)
        if m.scale is None and isinstance(d, int):
            scale = 1.0 / math.sqrt(d)
        elif m.scale is None:
            # The op's scale is a number: one that is a symbol goes to the query.
            root = emit(torch.sym_sqrt, emit(torch.ops.aten.sym_size.int, query, len(shape_of(query)) - 1))
            query = emit(torch.ops.aten.div.Tensor, query, root)
        kwargs: dict[str, Any] = {"scale": scale}
        if m.mask is not None:
            kwargs["mask" if val(m.mask).dtype == torch.bool else "bias"] = m.mask
        kwargs |= {"is_causal": True} if m.causal else {}
        kwargs |= {"dropout_p": m.p} if m.p else {}
        return emit(ops.attention, query, key, value, **kwargs, zero_masked_rows=True)

    def samples(self) -> Iterable[Example]:
        q, k, v = (torch.randn(2, h, 5, 8) for h in (4, 2, 2))
        keep = torch.rand(2, 1, 5, 5) > 0.5
        keep[0, 0, 0] = False
        attend = scaled_dot_product_attention
        yield Example(lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True), (q, k, v))
        yield Example(lambda q, keep: attend(q, q, q, keep, scale=0.3), (q, keep))
        yield Example(lambda q, bias: attend(q, q, q, bias), (q, torch.randn(5, 5)))

    def refusals(self) -> Iterable[Example]:
        q = torch.randn(1, 4, 5, 8)
        attend = scaled_dot_product_attention
        shared = lambda q, k: attend(q, k, k)  # noqa: E731
        yield Example(shared, (q, torch.randn(7, 8)), "different ranks")
