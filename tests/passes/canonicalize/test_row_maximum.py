"""A row maximum that is subtracted from scores: softmax does not see it, and what else follows may."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effopt.passes.canonicalize.recognize_attention import RecognizeAttention
from tests.passes.conftest import reasons_of, run_compared

SPELLED: dict[str, Callable[..., Tensor]] = {
    "of scores, with its dimension": lambda q, k, v: ((s := q @ k.mT) - s.amax(-1, True)).softmax(-1) @ v,
    "scaled down, shifted, scaled up": lambda q, k, v: (
        (((s := q @ k.mT / 32.0) - s.amax(-1).unsqueeze(-1)) * 8.0).softmax(-1) @ v
    ),
    "without its dimension": lambda q, k, v: (
        ((s := q @ k.mT) - s.max(-1).values.unsqueeze(3)).softmax(-1) @ v
    ),
    "detached between": lambda q, k, v: ((s := q @ k.mT) - s.amax(-1).detach().unsqueeze(-1)).softmax(-1) @ v,
    "then a mask that no score reaches": lambda q, k, v: (
        ((s := q @ k.mT) - s.amax(-1, True)).masked_fill(v[..., :1] > 0, -1e32).softmax(-1) @ v
    ),
    "then a bias": lambda q, k, v: ((s := q @ k.mT) - s.amax(-1, True) + v[..., :1]).softmax(-1) @ v,
}


def operands() -> list[Tensor]:
    torch.manual_seed(0)
    return [2.0 * torch.randn(2, 4, 6, 6) for _ in range(3)]


@pytest.mark.parametrize("name", SPELLED)
def test_is_not_seen(name: str) -> None:
    _, report = run_compared(SPELLED[name], *operands())
    assert report.ops["attention"] == 1, report.rejected


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "then tanh": (
        lambda q, k, v: torch.tanh((s := q @ k.mT) - s.amax(-1, True)).softmax(-1) @ v,
        "tanh of scores from which",
    ),
    "then a fill that scores reach": (
        lambda q, k, v: ((s := q @ k.mT) - s.amax(-1, True)).masked_fill(v > 0, -1.0).softmax(-1) @ v,
        "masked scores become -1.0 beside others",
    ),
    "of each column": (
        lambda q, k, v: ((s := q @ k.mT) - s.amax(-2).unsqueeze(-2)).softmax(-1) @ v,
        "a maximum over something else",
    ),
    "of each row, along columns": (
        lambda q, k, v: ((s := q @ k.mT) - s.amax(-1).unsqueeze(-2)).softmax(-1) @ v,
        "a maximum over something else",
    ),
    "of other scores": (
        lambda q, k, v: ((s := q @ k.mT) * 2.0 - s.amax(-1, True)).softmax(-1) @ v,
        "a maximum over something else",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_told_of(name: str) -> None:
    """Not left to the checks of rewrites: those have a limit of time, and a big graph is not checked."""
    function, reason = REFUSED[name]
    _, report = run_compared(function, *operands())
    assert report.ops["attention"] == 0
    assert reason in reasons_of(report, RecognizeAttention.name), report.rejected
