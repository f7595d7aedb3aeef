"""Sums of products are read as what they compute: the reading, evaluated by loops, is the tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effopt.graph.analyses.masks.sums import Axis, of
from effopt.graph.analyses.placed import Placed
from effopt.graph.analyses.products import product_at
from effopt.graph.values import shape_of
from tests.graph.analyses.sum_cases import number, traced

A, B = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
W = torch.randn(3, 5, dtype=torch.float64)
Form = Callable[[Tensor, Tensor, Tensor], Tensor]

SPELLINGS: dict[str, Form] = {
    "einsum": lambda a, b, w: torch.einsum("bin,bjn->bij", a, b) * w,
    "einsum of three": lambda a, b, w: torch.einsum("bin,bjn,ij->bij", a, b, w),
    "matmul": lambda a, b, w: (a @ b.mT) * w,
    "bmm": lambda a, b, w: torch.bmm(a, b.transpose(1, 2)) * w,
    "sum": lambda a, b, w: (a[:, :, None] * b[:, None]).sum(-1) * w,
    "sum that keeps": lambda a, b, w: (a[:, :, None] * b[:, None]).sum(3, keepdim=True)[..., 0] * w,
    "turned": lambda a, b, w: (torch.einsum("bin,bjn->jib", a, b) * w.T[..., None]).permute(2, 1, 0),
    "sums of sums": lambda a, b, w: torch.einsum("bij,bjn->bin", (a @ b.mT) * w, b),
    "a sum twice": lambda a, b, w: (s := a.sum(-1)) * s,
    "a size that broadcasts": lambda a, b, w: torch.einsum("bij,ij->bi", a[:, :, :1] @ b[:, :1, :1].mT, w),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_reading_is_the_tensor(name: str) -> None:
    form = SPELLINGS[name]
    root, inputs = traced(form, A, B, W)
    place = tuple(of(Axis(f"d{dim}", size)) for dim, size in enumerate(shape_of(root)))
    product = product_at(root, place)
    assert product.factors
    assert (name == "a sum twice") == (product.factors[0].node is root)
    if name == "a sum twice":
        return
    sizes = _sizes(product.factors)
    wanted = form(A, B, W)
    for at in itertools.islice(itertools.product(*(range(n) for n in wanted.shape)), 12):
        index = {f"d{dim}": i for dim, i in enumerate(at)}
        total = 0.0
        for inner in itertools.product(*(range(sizes[x]) for x in product.summed)):
            full = index | dict(zip(product.summed, inner, strict=True))
            term = 1.0
            for factor in product.factors:
                term *= float(inputs[factor.node][tuple(number(p, full) for p in factor.at)])
            total += term
        assert total == pytest.approx(float(wanted[at]), rel=1e-9)


def _sizes(factors: tuple[Placed, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for factor in factors:
        for at in factor.at:
            found |= {atom.name: atom.size for atom, _ in at.terms if isinstance(atom, Axis)}
    return found
