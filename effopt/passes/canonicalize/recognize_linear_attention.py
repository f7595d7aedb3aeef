"""Recognise linear attention that is written with a causal mask, or with a decay that is one.

    (scale * query @ key^T * decay(query - key), causal) @ value  =>  linear_attention(query, key, value, ...)

Exact up to reassociation and intermediate rounding. A value that is NaN or infinite spoils its own token
and later ones; in the original it spoils earlier ones too, by 0 * infinity. The decay is `exp(rate * (i -
j))` or `gamma ** (i - j)`, with one rate for all heads or one a head; or of gates of tokens, by differences
of a cumulative sum or by segment sums. A factor of keys goes to their values; queries and keys may be shared
between heads. The sum of the weights over keys, which normalises, is a linear attention whose values are
ones. No training needed. Saves the `[b, h, t, t]` weights: time and memory grow with t, and not with its
square, wherever a kernel or chunks take the op.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, section 3.3; with decay: Sun et al. 2023,
arXiv:2307.08621; Qin et al. 2023, arXiv:2307.14995; with gates: Dao & Gu 2024, arXiv:2405.21060.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from effopt.graph.analyses.masked_scores import bent_scores
from effopt.graph.linear_attention_form import read, write
from effopt.graph.pattern import ANY, HOLE, Capture, Named, OpBuilder, any_of, chain, tensor
from effopt.graph.rewrite import Emit, Match, PassResult
from effopt.passes.base import Context, Example, Rewrite, Stage

C = Capture


@dataclass(frozen=True)
class RecognizeLinearAttention(Rewrite):
    """Every spelling over matmul or bmm with a causal mask becomes `effopt::linear_attention`."""

    name: ClassVar[str] = "recognize-linear-attention"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    after: ClassVar[tuple[str, ...]] = ("spell-einsum",)

    def pattern(self, op: OpBuilder, query: Any, key: Any, value: Any) -> Any:
        q, k, v = tensor(query), tensor(key), tensor(value)
        weights = chain(
            "steps",
            Named("product", any_of(op.matmul(q, k), op.bmm(q, k))),
            mul=op.mul(HOLE, C("factor")),
            div=op.div(HOLE, C("factor")),
            tril=op.tril(HOLE, ANY),
            triu=op.triu(HOLE, ANY),
            keep=op.where(tensor("condition"), HOLE, C("fill")),
            drop=any_of(
                op.where(tensor("condition"), C("fill"), HOLE),
                op.masked_fill(HOLE, tensor("condition"), C("fill")),
            ),
            move=any_of(
                op.permute(HOLE, ANY),
                op.transpose(HOLE, ANY, ANY),
                op.unsqueeze(HOLE, ANY),
                op.expand(HOLE, ANY),
                op.repeat_interleave(HOLE, ANY, ANY, output_size=ANY),
            ),
            clone=op.clone(HOLE, memory_format=ANY),
            cast=any_of(op._to_copy(HOLE, dtype=ANY), op.type_as(HOLE, ANY)),
            dropout=op.dropout(HOLE, C("p"), C("train")),
        )
        return any_of(op.matmul(weights, v), op.bmm(weights, v), op.sum(weights, [-1], ANY))

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """As every rewrite, and tells of what no pattern can: weights that are bent."""
        result = super().apply(module, context)
        for node, reason in bent_scores(module.graph):
            result.reject(self.name, node, reason)
        return result

    def legal(self, m: Match) -> None:
        m.once(read)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return write(emit, m.once(read))

    def samples(self) -> Iterable[Example]:
        q, k, v = (torch.randn(2, 3, 9, n) for n in (4, 4, 5))
        rate = torch.tensor([0.1, 0.5, 2.0])
        square = tuple(torch.randn(2, 4, 4, 4) for _ in range(3))
        yield Example(lambda q, k, v: (q @ k.transpose(-2, -1) * 0.5).tril(0) @ v, square)
        yield Example(_normalised, (q.exp(), k.exp(), v))
        yield Example(_by_rate, (q, k, v, rate))
        yield Example(_powers, (q[0], k[0], v[0]))
        yield Example(_gated, (q, k, v, -torch.rand(2, 3, 9)))

    def refusals(self) -> Iterable[Example]:
        q, k, v = (torch.randn(2, 3, 9, 4) for _ in range(3))
        yield Example(lambda q, k, v: (q @ k.mT).tril(-1) @ v, (q, k, v), "its own key is hidden")
        yield Example(lambda q, k, v: (q @ k.mT).tril(2) @ v, (q, k, v), "the diagonal is shifted")
        yield Example(lambda q, k, v: (q @ k.mT).triu() @ v, (q, k, v), "not causal")
        yield Example(lambda q, k, v: (q @ k.mT).tril().triu(-3) @ v, (q, k, v), "is a window")
        yield Example(lambda q, k, v: (q @ k.mT * 0.5) @ v, (q, k, v), "every query sees every key")
        yield Example(lambda q, k, v, m: q @ k.mT * m @ v, (q, k, v, torch.eye(9)), "not known to be causal")
        yield Example(lambda q, k, v: (q[:, :, 5:] @ k.mT).tril() @ v, (q, k, v), "4 queries and 9 keys")
        yield Example(lambda q, k, v: [w := (q @ k.mT).tril(), w @ v], (q, k, v), "also used by")
        yield Example(lambda q, k, v: (q @ k.mT).masked_fill(_ahead(q), -1.0) @ v, (q, k, v), "than 0")
        yield Example(lambda q, k, v: _raised(q, k, v, 1.1), (q, k, v), "the decay grows")
        yield Example(lambda q, k, v: _raised(q, k, v, -0.9), (q, k, v), "change sign")
        yield Example(lambda q, k, v: _raised(q, k, v, q[0, 0, 0, 0]), (q, k, v), "known to be positive")
        yield Example(lambda q, k, v: (q @ k.mT).tril().half().float() @ v, (q, k, v), "are rounded to")
        some = lambda q, k, v, rates: _by_rate(q, k, v, rates[:3])  # noqa: E731
        yield Example(some, (q, k, v, torch.rand(5)), "one number a head")
        yield Example(lambda q, k, v: _raised(q, k, v, 1e-9), (q, k, v), "may overflow ahead")
        yield Example(lambda q, k, v: (q @ k.mT).relu().tril() @ v, (q, k, v), "go through aten.relu")
        yield Example(lambda q, k, v, g: _gated(q, k, v, g, 0), (q, k, v, -torch.rand(2, 3, 9)), "off by one")


def _ahead(q: torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[-2])
    return place > place[:, None]


def _normalised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.where(_ahead(q), 0.0, torch.einsum("bhid,bhjd->bhij", q, k))
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def _powers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[-2], dtype=torch.float32)
    apart = place.unsqueeze(-1) - place
    return torch.bmm(torch.bmm(q, k.mT) * torch.pow(0.9, apart.clamp(min=0)).tril(), v)


def _by_rate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[2])
    apart = place[:, None] - place
    decay = torch.exp(-rate[:, None, None] * apart).masked_fill(apart < 0, 0.0)
    return (q @ k.mT * decay * 0.5) @ v


def _gated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, first: int = 1
) -> torch.Tensor:
    """By segment sums: of the tokens from `first` behind the key on."""
    sums = g.unsqueeze(-1).expand(*g.shape, g.shape[-1]).tril(-first).cumsum(-2)
    return (q @ k.mT * sums.masked_fill(_ahead(q), -torch.inf).exp()) @ v


def _raised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[-2])
    apart = place[:, None] - place
    return (q @ k.mT * (gamma**apart * (apart >= 0))) @ v
