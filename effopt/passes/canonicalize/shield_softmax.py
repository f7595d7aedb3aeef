"""Respell a softmax between two matmuls that is not attention, so that Inductor does not take it for one.

    softmax(x, dim)  =>  e / sum(e, dim), e = exp(x - max(x, dim))

Exact: the same arithmetic as eager's softmax, with the maximum taken by `max.dim` and not `amax`.
Inductor's attention patterns ignore dimensions, permutations and masks (torch 2.13: `softmax(dim=-2)`
between two matmuls becomes attention, with errors above 1; pytorch/pytorch#196468, #195320), and begin at
`amax`. Only such a softmax is respelled; the rest of the pattern matcher stays on. No training needed.

Source: the stable softmax, Blanchard, Higham & Higham 2019, arXiv:1909.03469, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch

from effopt.graph.analyses.between_matmuls import is_between_matmuls
from effopt.graph.pattern import OpBuilder, any_of, tensor
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import is_floating, shape_of, val
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class ShieldSoftmax(Rewrite):
    """Runs last: attention was recognised by then, and what is left must stay what it is."""

    name: ClassVar[str] = "shield-softmax"
    stage: ClassVar[Stage] = Stage.FINISH

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (_aten.softmax.int,)

    def pattern(self, op: OpBuilder, x: Any, dim: Any, dtype: Any) -> Any:
        return any_of(op.softmax(tensor(x), dim, dtype), op._softmax(tensor(x), dim, dtype))

    def legal(self, m: Match) -> None:
        require(is_floating(m.x), "softmax of something that is not floating-point", m.root)
        require(bool(shape_of(m.x)), "softmax of a single number", m.root)
        # Inductor takes no other for attention: nothing to do, and nothing to tell.
        require(is_between_matmuls(m.root), "", m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        # `softmax(dtype=)` casts first; narrow types are widened inside the op, which is written out.
        result = val(m.root).dtype
        wide = torch.promote_types(torch.promote_types(val(m.x).dtype, result), torch.float32)
        x = emit.cast(m.x, wide)
        largest = emit(_aten.max.dim, emit(_aten.detach.default, x), m.dim, True)
        shifted = emit(_aten.sub.Tensor, x, emit(getitem, largest, 0))
        weights = emit(_aten.exp.default, shifted)
        out = emit(_aten.div.Tensor, weights, emit(_aten.sum.dim_IntList, weights, [m.dim], True))
        return emit.cast(out, result)

    def samples(self) -> Iterable[Example]:
        q = torch.randn(2, 4, 4, 4)
        for dim in (-2, 1):
            yield Example(lambda q, d=dim: ((q @ q.mT) / 2.0).softmax(d) @ q, (q,))
        yield Example(lambda q: [w := (q @ q.mT).softmax(-1), w @ q], (q,))

    def refusals(self) -> Iterable[Example]:
        x, w = torch.randn(3, 5), torch.randn(5, 5)
        yield Example(lambda x, w: (x @ w).sum().softmax(0) * w @ w, (x, w), "of a single number")
