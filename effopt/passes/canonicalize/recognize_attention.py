"""Recognise attention, however its scores are scaled, capped, biased and masked.

    dropout(softmax(mask(softcap(scale * query @ key^T) + bias))) @ value  =>  attention(query, key, ...)

Exact up to reassociation and intermediate rounding (the op keeps scores in float32). Rows that see no
key keep the result of the original: NaN for -inf, uniform for a finite fill. No training needed. Saves
the round trips of the `[b, h, t, s]` scores through memory wherever a kernel takes the op.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; grouped queries: Ainslie et al. 2023,
arXiv:2305.13245, section 2.2; sinks: Xiao et al. 2023, arXiv:2309.17453, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from effopt.graph.analyses.between_matmuls import feeds_matmul, without_product
from effopt.graph.attention_form import read, write
from effopt.graph.pattern import ANY, HOLE, Capture, Named, OpBuilder, any_of, chain, tensor
from effopt.graph.rewrite import Emit, Match, PassResult, require
from effopt.passes.base import Context, Example, Rewrite, Stage

C = Capture
_SOFTMAX = torch.ops.aten.softmax.int


@dataclass(frozen=True)
class RecognizeAttention(Rewrite):
    """Every spelling over matmul or bmm becomes `effopt::attention`."""

    name: ClassVar[str] = "recognize-attention"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    after: ClassVar[tuple[str, ...]] = ("spell-einsum", "spell-softmax")
    may_duplicate: ClassVar[bool] = False

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (_SOFTMAX,)

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """As every rewrite, but silent on a softmax that weighs nothing, such as a router's."""
        result = super().apply(module, context)
        left = {n.name: n for n in module.graph.find_nodes(op="call_function", target=_SOFTMAX)}
        kept = [r for r in result.rejected if r.node not in left or feeds_matmul(left[r.node])]
        result.rejected = [replace(r, reason=without_product(left.get(r.node)) or r.reason) for r in kept]
        return result

    def pattern(self, op: OpBuilder, query: Any, key: Any, value: Any) -> Any:
        q, k, v = tensor(query), tensor(key), tensor(value)
        with_bias = op.baddbmm(tensor("added"), q, k, beta=C("beta"), alpha=C("alpha"))
        scores = chain(
            "steps", Named("product", any_of(op.matmul(q, k), op.bmm(q, k), with_bias)), **_on_scores(op)
        )
        with_sink = op.cat([scores, tensor("sinks")], C("sink_dim"))
        sunk = chain("outer", with_sink, shift=_shift(op), cast=op._to_copy(HOLE, dtype=ANY))
        weights = any_of(_softmax(op, scores), op.slice(_softmax(op, sunk), -1, 0, C("kept")))
        used = chain("after", weights, **_on_weights(op))
        return any_of(op.matmul(used, v), op.bmm(used, v))

    def legal(self, m: Match) -> None:
        form = m.once(read)
        reason = "training: `max` halves the gradients of a row that sees no key; take `clamp(min=...)`"
        require(not (m.in_training and form.scores.halves), reason, m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return write(emit, m.once(read))

    def samples(self) -> Iterable[Example]:
        q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))
        keep = torch.rand(2, 1, 5, 7) > 0.3
        bias = torch.randn(4, 5, 7)

        def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            scores = torch.tanh(q @ k.mT / 8.0 / 5.0) * 5.0
            return torch.softmax(bias + scores, -1, dtype=torch.float32).to(q.dtype) @ v

        def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            flat = [x.reshape(8, -1, 8) for x in (q, k, v)]
            scores = torch.baddbmm(bias.repeat(2, 1, 1), flat[0], flat[1].mT, alpha=0.3)
            return torch.bmm(scores.view(2, 4, 5, 7).softmax(-1).view(8, 5, 7), flat[2]).view(2, 4, 5, 8)

        def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return (q @ k.mT).mul(0.3).masked_fill(~keep, float("-inf")).softmax(-1) @ v

        yield Example(capped, (q, k, v, bias))
        yield Example(merged, (q, k, v, bias))
        yield Example(masked, (q, k, v, keep))

    def refusals(self) -> Iterable[Example]:
        q = torch.randn(2, 4, 4, 4)
        for dim in (-2, 1):
            yield Example(lambda q, d=dim: (q @ q.mT).softmax(d) @ q, (q,), "dim")
        yield Example(lambda q: [w := (q @ q.mT).softmax(-1), w @ q], (q,), "also used by")
        late = lambda q, b: ((q @ q.mT + b) * -2.0).softmax(-1) @ q  # noqa: E731
        yield Example(late, (q, torch.randn(4, 4)), "negative")
        wide = lambda q, b: (q @ q.mT + b).softmax(-1) @ q  # noqa: E731
        yield Example(wide, (q[:1], torch.randn(2, 1, 4, 4)), "enlarges")
        yield Example(lambda q, w: (q @ w).softmax(-1) @ q, (q, torch.randn(4, 4)), "different ranks")


def _softmax(op: OpBuilder, scores: Any) -> Any:
    kinds = (op.softmax, op._softmax, op._safe_softmax)
    return any_of(*(kind(scores, -1, ANY) for kind in kinds), tag="softmax_kind")


def _shift(op: OpBuilder) -> Any:
    largest = any_of(op.getitem(op.max(ANY, ANY, ANY), 0), op.amax(ANY, ANY, ANY))
    largest = any_of(largest, op.unsqueeze(largest, ANY))
    return op.sub(HOLE, Named("peak", any_of(largest, op.detach(largest))))


def _views(op: OpBuilder) -> dict[str, Any]:
    view = any_of(*(view(HOLE, C("sizes")) for view in (op.view, op._unsafe_view, op.reshape)))
    copy = op.clone(HOLE, memory_format=ANY)
    cast = any_of(op._to_copy(HOLE, dtype=ANY), op.type_as(HOLE, ANY))
    return {"view": view, "clone": copy, "cast": cast}


def _on_scores(op: OpBuilder) -> dict[str, Any]:
    """What may stand between the product and softmax; `analyses.score_terms` says what each means."""
    return _views(op) | {
        "mul": op.mul(HOLE, C("factor")),
        "div": op.div(HOLE, C("factor")),
        "tanh": op.tanh(HOLE),
        "add": op.add(HOLE, C("term")),
        "shift": _shift(op),
        "sub": op.sub(HOLE, C("term")),
        "keep": op.where(tensor("condition"), HOLE, C("fill")),
        "drop": op.where(tensor("condition"), C("fill"), HOLE),
        "floor": any_of(*(least(HOLE, C("least")) for least in (op.max, op.maximum, op.clamp_min, op.clamp))),
        "masked": op.masked_fill(HOLE, tensor("condition"), C("fill")),
        "dropout": op.dropout(HOLE, C("p"), C("train")),
    }


def _on_weights(op: OpBuilder) -> dict[str, Any]:
    native = op.getitem(op.native_dropout(HOLE, C("p"), C("train")), 0)
    dropouts = {"dropout": op.dropout(HOLE, C("p"), C("train")), "native": native}
    hidden, seen = op.masked_fill(HOLE, tensor("hidden"), 0), op.where(tensor("seen"), HOLE, 0)
    return _views(op) | dropouts | {"zeroed": any_of(hidden, seen)}
