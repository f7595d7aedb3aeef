"""Recognise linear layers that are spelled as a matrix product.

    addmm(b, x, w^T) | matmul(x, w^T) + b | mm(x, w^T)  =>  linear(x, w, b)
    view(addmm(b, view(x, [-1, k]), w))                 =>  linear(x, w^T, b)      (GPT-2's Conv1D)

A transposed weight stays a view: nothing is copied, for the matrix product reads either order.
Exact up to reassociation. Inference and training. Saves no arithmetic; later passes match one op.
Source: torch.nn.Linear; the [in, out] weight is that of Radford et al. 2019, GPT-2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.pattern import ANY, Named, OpBuilder, any_of, parameter
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import shape_of, val
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeLinear(Rewrite):
    """A product with a two-dimensional weight becomes `aten.linear`."""

    name: ClassVar[str] = "recognize-linear"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    # Both factors of an attention product can be inputs of the graph; what is left afterwards is a layer.
    after: ClassVar[tuple[str, ...]] = ("recognize-attention",)

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        """Every `addmm` is a linear layer, or worth a reason."""
        return (_aten.addmm.default,)

    def pattern(self, op: OpBuilder, x: Any) -> Any:
        def given(name: str) -> Any:
            source = parameter(f"{name}_source")
            return Named(name, any_of(op._to_copy(source, dtype=ANY), source))

        w, bias = given("w"), given("bias")
        turned = any_of(op.t(w), op.transpose(w, 0, 1), op.permute(w, [1, 0]), given("wt"))
        flat = Named("flat", op.view(x, ANY))
        product = any_of(op.mm(x, turned), op.matmul(x, turned))
        return any_of(
            op.view(op.addmm(bias, flat, turned), ANY),
            op.view(op.mm(flat, turned), ANY),
            op.addmm(bias, x, turned),
            op.add(product, bias),
            *product.options,
        )

    def legal(self, m: Match) -> None:
        weight = m.w if m.w is not None else m.wt
        require(len(shape_of(weight)) == 2, f"the weight is {list(shape_of(weight))}, not [n, k]", m.root)
        n, k = shape_of(weight) if m.w is not None else shape_of(weight)[::-1]
        x = shape_of(m.x)
        require(len(x) >= 2, "x is a single vector", m.root)
        require(statically_known_true(x[-1] == k), f"x is {list(x)}, the weight takes {k}", m.root)
        if m.flat is not None:
            result = shape_of(m.root)
            is_same = len(result) == len(x) and all(
                statically_known_true(a == b) for a, b in zip(result[:-1], x[:-1], strict=True)
            )
            require(is_same, "the product is viewed in another shape than x was", m.root)
        if m.bias is not None:
            shape = shape_of(m.bias)
            require(
                len(shape) == 1 and statically_known_true(shape[0] == n),
                f"bias is {list(shape)}, not [n]",
                m.root,
            )
            require(
                val(m.bias).dtype == val(m.x).dtype,
                f"bias is {val(m.bias).dtype}, x {val(m.x).dtype}",
                m.root,
            )

    def rewrite(self, emit: Emit, m: Match) -> Any:
        weight: Node = m.w if m.w is not None else emit(_aten.t.default, m.wt)
        return emit(ops.linear, m.x, weight, *(() if m.bias is None else (m.bias,)))

    def samples(self) -> Iterable[Example]:
        x, w, b = torch.randn(2, 5, 24), torch.randn(12, 24), torch.randn(12)
        yield Example(lambda x, w, b: torch.addmm(b, x, w.t()), (x[0], w, b))
        yield Example(lambda x, w, b: x @ w.T + b, (x, w, b))
        yield Example(lambda x, w: x @ w.transpose(0, 1), (x, w))
        yield Example(lambda x, w: torch.mm(x, w), (x[0], w.t().contiguous()))
        yield Example(
            lambda x, w, b: torch.addmm(b, x.view(-1, x.size(-1)), w).view(2, 5, 12),
            (x, w.t().contiguous(), b),
        )

    def refusals(self) -> Iterable[Example]:
        x, w = torch.randn(5, 24), torch.randn(24, 12)
        yield Example(
            lambda x, w, b: torch.addmm(b, x, w), (x, w, torch.randn(5, 12)), "bias is [5, 12], not [n]"
        )
        yield Example(
            lambda x, w, b: torch.addmm(b, x, w.cos()), (x, w, torch.randn(12)), "is computed, not an input"
        )
        yield Example(lambda x, w, b: torch.addmm(b, x, w, beta=2), (x, w, torch.randn(12)), "beta")
