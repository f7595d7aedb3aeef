"""Which softmax is told of when no pass takes it: one whose weights a product reads, sooner or later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.conftest import reasons_of, run_compared

WEIGHED: dict[str, Callable[[Tensor], Tensor]] = {
    "padded, as Longformer's chunks": lambda q: (
        F.pad((q @ q.mT).softmax(-1), (0, 1)) @ F.pad(q, (0, 0, 0, 1))
    ),
    "cast to the type of another": lambda q: (q @ q.mT).softmax(-1).type_as(q).flip(-1) @ q,
    "kept beside": lambda q: (w := (q @ q.mT).softmax(-1)) @ q + w.sum(),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_told(name: str) -> None:
    _, report = run_compared(WEIGHED[name], torch.randn(2, 4, 5, 5))
    assert report.ops["attention"] == 0
    assert reasons_of(report, "recognize-attention")


def test_a_softmax_that_weighs_nothing_is_not_told_of() -> None:
    _, report = run_compared(
        lambda q: F.pad((q @ q.mT).softmax(-1), (0, 1)).amax(-1), torch.randn(2, 4, 5, 5)
    )
    assert not reasons_of(report, "recognize-attention")
