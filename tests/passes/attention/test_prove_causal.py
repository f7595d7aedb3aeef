"""A mask becomes causal only where the graph proves it; anything near stays a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.passes.attention.prove_causal import ProveCausal

INF = float("inf")


def added(mask: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda q: (q @ q.mT + mask(q.shape[2])).softmax(-1) @ q


def kept(mask: Callable[[int], Tensor], fill: float = -INF) -> Callable[[Tensor], Tensor]:
    return lambda q: torch.where(mask(q.shape[2]), q @ q.mT, fill).softmax(-1) @ q


def compared(n: int) -> Tensor:
    at = torch.arange(n)
    return at[None, :] <= at[:, None]


CAUSAL = {
    "triu of -inf": added(lambda n: torch.full((n, n), -INF).triu(1)),
    "tril of ones": kept(lambda n: torch.ones(n, n, dtype=torch.bool).tril()),
    "finite fill": kept(lambda n: torch.ones(n, n, dtype=torch.bool).tril(), -1e30),
    "compared positions": kept(compared),
    "swapped sides": kept(lambda n: torch.arange(n)[:, None] >= torch.arange(n)),
    "strict, shifted": kept(lambda n: torch.arange(n)[:, None] + 1 > torch.arange(n)),
    "negated": kept(lambda n: ~(torch.arange(n) > torch.arange(n)[:, None])),
    "where of zero": added(lambda n: torch.where(compared(n), 0.0, torch.finfo(torch.float32).min)),
}
NOT_CAUSAL = {
    "strictly before": kept(lambda n: torch.ones(n, n, dtype=torch.bool).tril(-1)),
    "one ahead": kept(lambda n: torch.arange(n) <= torch.arange(n)[:, None] + 1),
    "transposed": kept(lambda n: torch.arange(n)[:, None] <= torch.arange(n)),
    "small fill": kept(lambda n: torch.ones(n, n, dtype=torch.bool).tril(), -5.0),
    "small bias": added(lambda n: torch.full((n, n), -5.0).triu(1)),
    "bias below the diagonal too": added(lambda n: torch.full((n, n), -INF).triu(1) + 1.0),
    "sliding window": kept(lambda n: compared(n) & (torch.arange(n) > torch.arange(n)[:, None] - 3)),
    "random": kept(lambda n: torch.rand(n, n) < 0.5),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str, dynamic: bool | None, compiled: Any) -> None:
    q = torch.randn(2, 3, 6, 8)
    out, report = compiled(CAUSAL[name], q, dynamic=dynamic)
    assert report.counts[ProveCausal.name] == 1, report.rejected
    torch.testing.assert_close(out, CAUSAL[name](q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_not_causal(name: str, dynamic: bool | None, compiled: Any) -> None:
    q = torch.randn(2, 3, 6, 8)
    torch.manual_seed(1)  # the random mask is drawn anew by each call, from the same state
    out, report = compiled(NOT_CAUSAL[name], q, dynamic=dynamic)
    assert report.ops["attention"] == 1, report.rejected
    assert report.counts[ProveCausal.name] == 0
    torch.manual_seed(1)
    torch.testing.assert_close(out, NOT_CAUSAL[name](q), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_learned_bias_is_no_near_miss(compiled: Any) -> None:
    """No user can make a causal mask of a position bias: neither proof tells of one."""
    q, table = torch.randn(2, 3, 6, 8), torch.randn(11, 3)

    def biased(q: Tensor, table: Tensor) -> Tensor:
        at = torch.arange(6)
        near = F.embedding(at[:, None] - at + 5, table).permute(2, 0, 1) + 1.0
        return (q @ q.mT + near).softmax(-1) @ q

    out, report = compiled(biased, q, table)
    assert report.ops["attention"] == 1
    assert report.counts[ProveCausal.name] == 0
    assert {r.pass_name for r in report.rejected} == {"recover-mask-structure"}
    torch.testing.assert_close(out, biased(q, table), rtol=1e-5, atol=1e-5)
