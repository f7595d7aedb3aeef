"""Write an einsum that is one batched matmul as that matmul.

    einsum("bqhd,bkhd->bhqk", q, k)  =>  matmul(permute(q), permute(k).transpose(-2, -1))

Exact: it is what einsum itself does. Only two operands with one contracted letter, one free letter each
and the others shared: the products of attention. No training needed. Saves nothing by itself;
attention is recognised by it.

Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.einsum_letters import letters_of
from effopt.graph.pattern import ANY, OpBuilder, tensor
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import shape_of, val
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class SpellEinsum(Rewrite):
    """Einsums between query and key, and between weights and value."""

    name: ClassVar[str] = "spell-einsum"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (_aten.einsum.default,)

    def pattern(self, op: OpBuilder, equation: Any, a: Any, b: Any) -> Any:
        return op.einsum(equation, [tensor(a), tensor(b)], path=ANY)

    def legal(self, m: Match) -> None:
        plan = _read(m)
        require(val(m.a).dtype == val(m.b).dtype, "the operands have different dtypes", m.root)
        sizes = (shape_of(x)[letters.index(plan.summed)] for x, letters in ((m.a, plan.a), (m.b, plan.b)))
        require(
            statically_known_true(next(sizes) == next(sizes)), "the contracted dimension broadcasts", m.root
        )

    def rewrite(self, emit: Emit, m: Match) -> Any:
        plan = _read(m)
        left, right = _read_sides(m, plan)
        shared = plan.shared
        rows = _ordered(emit, *left, shared + plan.rows + plan.summed)
        if right[1][-1] == plan.summed:
            # Transposed last, so that the key behind it is seen.
            columns = _ordered(emit, *right, shared + plan.columns + plan.summed)
            columns = emit(_aten.transpose.int, columns, -2, -1)
        else:
            columns = _ordered(emit, *right, shared + plan.summed + plan.columns)
        product = emit(_aten.matmul.default, rows, columns)
        return _ordered(emit, product, shared + plan.rows + plan.columns, plan.out)

    def samples(self) -> Iterable[Example]:
        q, k = torch.randn(2, 5, 3, 4), torch.randn(2, 7, 3, 4)
        yield Example(lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q, k), (q, k))
        yield Example(lambda w, v: torch.einsum("bhqk,bkhd->bqhd", w, v), (torch.randn(2, 3, 5, 7), k))
        yield Example(
            lambda v, w: torch.einsum("bnd,bmn->bmd", v, w), (torch.randn(2, 7, 4), torch.randn(2, 5, 7))
        )

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(3, 3, 3)
        yield Example(lambda x: torch.einsum("bij,bij->b", x, x), (x,), "not one batched matmul")
        yield Example(lambda x: torch.einsum("bii,bij->bij", x, x), (x,), "not one batched matmul")
        yield Example(lambda x: torch.einsum("...ij,...jk->...ik", x, x), (x,), "not one batched matmul")
        yield Example(lambda x: torch.einsum("abi,cbi->abc", x, x[:, :, :1]), (x,), "broadcasts")


@dataclass(frozen=True)
class _Product:
    """Letters of an einsum by role."""

    a: str
    b: str
    out: str
    shared: str
    rows: str
    columns: str
    summed: str


def _read(m: Match) -> _Product:
    found = letters_of(str(m.equation))
    reason = f"{m.equation} is not one batched matmul"
    require(found is not None, reason, m.root)
    assert found is not None
    (a, b), out = found
    shared = "".join(x for x in out if x in a and x in b)
    free = [x for x in out if x not in shared]
    summed = "".join(x for x in a if x in b and x not in out)
    whole = len(free) == 2 and len(summed) == 1 and len(a) == len(b) == len(shared) + 2
    sides = whole and {free[0] in a, free[1] in a} == {True, False}
    require(sides and bool(shared), reason, m.root)
    return _Product(a, b, out, shared, free[0], free[1], summed)


def _read_sides(m: Match, plan: _Product) -> tuple[tuple[Node, str], tuple[Node, str]]:
    a, b = (m.a, plan.a), (m.b, plan.b)
    return (a, b) if plan.rows in plan.a else (b, a)


def _ordered(emit: Emit, node: Node, letters: str, wanted: str) -> Node:
    order = [letters.index(x) for x in wanted]
    return node if order == sorted(order) else emit(_aten.permute.default, node, order)
