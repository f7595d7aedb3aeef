"""Recognise linear attention that is written as a cumulative sum of key-value products.

    states = (key[..., :, None] * value[..., None, :]).cumsum(time);  (query[..., None] * states).sum(-2)
      =>  linear_attention(query, key, value)

The products may be einsums, broadcast multiplications or matmuls of single rows, with tokens before heads or
behind. Exact up to reassociation; the op sums in float32 where the original sums in less. A token that is NaN
or infinite spoils itself and later ones, as in the original, and none before it; NaN may stand for infinity,
and gradients of any token may be NaN then. No training needed.
Saves the states of all tokens, `[b, h, t, d, dv]`. A normaliser, `(query * key.cumsum(time)).sum(-1)`, costs
no more than its operands, and stays as it is.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, equations 9 to 12.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from effopt.graph.cumulative_attention_form import read, write
from effopt.graph.pattern import ANY, Named, OpBuilder, any_of, tensor
from effopt.graph.rewrite import Emit, Match, PassResult
from effopt.graph.values import is_floating, shape_of
from effopt.passes.base import Context, Example, Rewrite, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeCumulativeAttention(Rewrite):
    """Every spelling with a cumulative sum of states becomes `effopt::linear_attention`."""

    name: ClassVar[str] = "recognize-cumulative-attention"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    may_duplicate: ClassVar[bool] = False

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (_aten.cumsum.default,)

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """As every rewrite, but silent on cumulative sums of anything else than products of two tensors."""
        result = super().apply(module, context)
        sums = {n.name: n for n in module.graph.find_nodes(op="call_function", target=_aten.cumsum.default)}
        result.rejected = [r for r in result.rejected if r.node not in sums or _is_of_states(sums[r.node])]
        return result

    def pattern(self, op: OpBuilder, x: Any, y: Any, a: Any, dim: Any) -> Any:
        x, y = tensor(x), tensor(y)
        products = any_of(op.einsum(ANY, [x, y], path=ANY), op.mul(x, y), op.matmul(x, y))
        states = Named("states", op.cumsum(Named("products", products), dim))
        return any_of(
            Named("contraction", op.einsum(ANY, [states, tensor(a)], path=ANY)),
            Named("contraction", op.einsum(ANY, [tensor(a), states], path=ANY)),
            op.sum(Named("contraction", op.mul(tensor(a), states)), [-2]),
            op.sum(Named("contraction", op.mul(tensor(a), states)), [-1]),
            op.squeeze(Named("contraction", op.matmul(tensor(a), states)), -2),
            op.select(Named("contraction", op.matmul(tensor(a), states)), -2, 0),
        )

    def legal(self, m: Match) -> None:
        m.once(read)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return write(emit, m.once(read))

    def samples(self) -> Iterable[Example]:
        q, k, v = (torch.randn(2, 3, 9, n) for n in (4, 4, 5))
        yield Example(_by_einsum, (q, k, v))
        yield Example(_by_products, (q, k, v))
        yield Example(_by_rows, (q[0], k[0], v[0]))

    def refusals(self) -> Iterable[Example]:
        q, k, v = (torch.randn(2, 3, 4, 4) for _ in range(3))
        yield Example(lambda q, k, v: _contracted(q, _states(k, v, -1)), (q, k, v), "over a channel")
        yield Example(lambda q, k, v: [s := _states(k, v, 2), _contracted(q, s)], (q, k, v), "also used by")
        yield Example(lambda q, k, v: _contracted(q[:, :1], _states(k, v, 2)), (q, k, v), "is broadcast")
        yield Example(
            lambda q, k, v: (q.unsqueeze(-1) * _states(k, v, 2)).sum(-1), (q, k, v), "not that of the query"
        )
        yield Example(
            lambda q, k, v: torch.einsum("bhtd,bhtde->bhe", q, _states(k, v, 2)),
            (q, k, v),
            "sums over the time",
        )
        yield Example(
            lambda q, k, w: (q * (k * w.unsqueeze(-1)).cumsum(2)).sum(-1), (q, k, v[..., 0]), "0 channel"
        )
        yield Example(_of_matrices, (q, k, v.unflatten(-1, (2, 2))), "2 channel")


def _is_of_states(node: Node) -> bool:
    """Whether a cumulative sum is over real products with room for a key and a value."""
    source = node.args[0]
    makes = (_aten.einsum.default, _aten.mul.Tensor, _aten.matmul.default)
    return (
        isinstance(source, Node) and source.target in makes and len(shape_of(node)) >= 4 and is_floating(node)
    )


def _states(k: torch.Tensor, v: torch.Tensor, dim: int) -> torch.Tensor:
    return (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(dim)


def _contracted(q: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return (q.unsqueeze(-1) * states).sum(-2)


def _of_matrices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    states = torch.einsum("bhtd,bhtef->bhtdef", k, v).cumsum(2)
    return torch.einsum("bhtd,bhtdef->bhtef", q, states)


def _by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    states = torch.einsum("blhd,blhm->blhmd", k, v).cumsum(1)
    normal = 1 / (torch.einsum("blhd,blhd->blh", q, k.cumsum(1)).abs() + 1.0)
    return torch.einsum("blhd,blhmd->blhm", q, states) * normal.unsqueeze(-1)


def _by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _contracted(q, _states(k, v, -3))


def _by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    states = (k.unsqueeze(-1) @ v.unsqueeze(-2)).cumsum(1)
    return (q.unsqueeze(-2) @ states).squeeze(-2)
