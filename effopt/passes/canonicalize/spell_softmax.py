"""Take a softmax that is written out as one op.

    e = exp(x - max(x, dim)); e / sum(e, dim)  =>  softmax(x, dim)
    exp(x - logsumexp(x, dim)),  exp(log_softmax(x, dim))  =>  softmax(x, dim)

Exact up to reassociation. Without the maximum `exp` overflows where softmax does not: left alone. No
training needed. Saves nothing by itself; attention and routers are recognised by it.

Source: the stable softmax, Blanchard, Higham & Higham 2019, arXiv:1909.03469, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from effopt.graph.pattern import ANY, OpBuilder, any_of, tensor
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import is_floating, shape_of, val
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class SpellSoftmax(Rewrite):
    """The three usual spellings over one dimension."""

    name: ClassVar[str] = "spell-softmax"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def pattern(self, op: OpBuilder, x: Any, dim: Any, dims: Any) -> Any:
        x = tensor(x)
        plain = any_of(op.getitem(op.max(x, dim, True), 0), op.amax(x, dims, True))
        detached = any_of(
            op.getitem(op.max(op.detach(x), dim, True), 0),
            op.amax(op.detach(x), dims, True),
            op.detach(plain),
        )
        weights = op.exp(op.sub(x, any_of(plain, detached)))
        normalised = op.div(weights, op.sum(weights, dims, True))
        by_logarithm = op.exp(op.sub(x, op.logsumexp(x, dims, True)))
        return any_of(normalised, by_logarithm, op.exp(op.log_softmax(x, dim, ANY)))

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (_aten.amax.default, _aten.max.dim, _aten.logsumexp.default)

    def legal(self, m: Match) -> None:
        require(is_floating(m.x), "the operand is not real and floating-point", m.root)
        dims = m.dims if m.dims is not None else [m.dim]
        require(len(dims) == 1, "the sum is over more than one dimension", m.root)
        rank = len(shape_of(m.x))
        same = m.dim is None or m.dim % rank == dims[0] % rank
        require(same, f"the maximum is over dimension {m.dim} and the sum over {dims[0]}", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        dim = m.dims[0] if m.dims is not None else m.dim
        result = val(m.root).dtype
        return emit(_aten.softmax.int, m.x, dim, None if result == val(m.x).dtype else result)

    def samples(self) -> Iterable[Example]:
        x = torch.randn(3, 5)

        def stable(x: torch.Tensor) -> torch.Tensor:
            weights = torch.exp(x - x.amax(dim=-1, keepdim=True))
            return weights / weights.sum(-1, keepdim=True)

        def with_max(x: torch.Tensor) -> torch.Tensor:
            weights = (x - x.max(0, keepdim=True).values).exp()
            return weights / weights.sum(0, keepdim=True)

        yield Example(stable, (x,))
        yield Example(with_max, (x,))
        yield Example(lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(), (x,))
        yield Example(lambda x: x.log_softmax(-1).exp(), (x,))

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(3, 3)

        def crossed(x: torch.Tensor) -> torch.Tensor:
            weights = (x - x.max(0, keepdim=True).values).exp()
            return weights / weights.sum(1, keepdim=True)

        def unshifted(x: torch.Tensor) -> torch.Tensor:
            return x.exp() / x.exp().sum(-1, keepdim=True) + x.amax(-1, keepdim=True)

        yield Example(crossed, (x,), "the maximum is over dimension 0 and the sum over 1")
        yield Example(unshifted, (x,), "no form that this pass knows")
