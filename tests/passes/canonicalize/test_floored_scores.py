"""Scores kept from -inf by `max(scores, lowest)`, as XGLM does: attention, unless that changes a score."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.conftest import reasons_of, run_compiled

T, S, D = 5, 7, 16
LOWEST = torch.finfo(torch.float32).min
INF = float("inf")


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, n, D, dtype=dtype) for n in (T, S, S)]


def keep() -> Tensor:
    """Some keys; the third row sees none."""
    seen = torch.rand(2, 1, T, S, generator=torch.Generator().manual_seed(3)) > 0.4
    seen[..., 0] = True
    seen[0, 0, 2] = False
    return seen


def weighed(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def biased(mask: Tensor, number: float) -> Tensor:
    return torch.where(mask, torch.zeros(()), number)


FLOORED: dict[str, Callable[..., Tensor]] = {
    "max with a tensor, behind a bias": lambda q, k, v, m: weighed(
        torch.max(q @ k.mT + biased(m, LOWEST), torch.tensor(LOWEST)), v
    ),
    "in bmm": lambda q, k, v, m: weighed(
        torch.max(
            (q.flatten(0, 1) @ k.flatten(0, 1).mT).view(2, 4, T, S) + biased(m, LOWEST), torch.tensor(LOWEST)
        ).view(8, T, S),
        v.flatten(0, 1),
    ),
    "clamp": lambda q, k, v, m: weighed((q @ k.mT + biased(m, LOWEST)).clamp(min=LOWEST), v),
    "clamp_min, then scaled": lambda q, k, v, m: weighed(
        (q @ k.mT + biased(m, -1e32)).clamp_min(LOWEST) * 0.5, v
    ),
    "maximum, of masked scores": lambda q, k, v, m: weighed(
        torch.maximum((q @ k.mT).masked_fill(~m, -INF), torch.tensor(LOWEST)), v
    ),
    "a bias by masked_fill": lambda q, k, v, m: weighed(
        (q @ k.mT + torch.zeros(2, 1, T, S).masked_fill(~m, LOWEST)).clamp(min=LOWEST), v
    ),
    "ahead of the mask": lambda q, k, v, m: weighed((q @ k.mT).clamp(min=LOWEST).masked_fill(~m, -1e9), v),
    "-inf": lambda q, k, v, m: weighed((q @ k.mT).masked_fill(~m, -1e9).clamp(min=-INF), v),
}


@pytest.mark.parametrize("name", FLOORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recognised(name: str, dtype: torch.dtype) -> None:
    inputs = [*operands(dtype), keep()]
    out, report = run_compiled(FLOORED[name], *inputs, verify="off")
    assert report.ops["attention"] == 1, report.rejected
    torch.testing.assert_close(out, FLOORED[name](*inputs), rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a number that scores reach": (
        lambda q, k, v, m: weighed((q @ k.mT).masked_fill(~m, -INF).clamp(min=-1.0), v),
        "which scores may reach",
    ),
    "a tensor": (
        lambda q, k, v, m: weighed(torch.maximum(q @ k.mT, q.sum(-1, keepdim=True)), v),
        "of a tensor is taken",
    ),
    "from above": (lambda q, k, v, m: weighed((q @ k.mT).clamp(max=LOWEST), v), "expected"),
    "from both sides": (lambda q, k, v, m: weighed((q @ k.mT).clamp(LOWEST, 1.0), v), "expected"),
    "a bias that comes in": (
        lambda q, k, v, m: weighed((q @ k.mT + q.sum((1, 3))[:, None, :, None]).clamp(min=LOWEST), v),
        "a bias that may be -inf",
    ),
    "a bias of -inf": (
        lambda q, k, v, m: weighed((q @ k.mT + biased(m, -INF)).clamp(min=LOWEST), v),
        "a bias that may be -inf",
    ),
    "more scores": (
        lambda q, k, v, m: weighed(
            torch.maximum(q[:1, :1] @ k[:1, :1].mT, torch.full((2, 4, 1, 1), LOWEST)), v
        ),
        "enlarges",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, reason = REFUSED[name]
    inputs = [*operands(), keep()]
    out, report = run_compiled(function, *inputs, verify="off")
    assert report.ops["attention"] == 0
    assert reason in reasons_of(report, "recognize-attention")
    torch.testing.assert_close(out, function(*inputs), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_float16_reaches_its_lowest() -> None:
    inputs = [x.half() for x in operands()]
    lowest = torch.finfo(torch.float16).min
    function = lambda q, k, v: weighed((q @ k.mT).clamp(min=lowest), v)  # noqa: E731
    _, report = run_compiled(function, *inputs)
    assert "which scores may reach" in reasons_of(report, "recognize-attention")


@pytest.mark.parametrize("name", FLOORED)
def test_gradients(name: str) -> None:
    """`max` of two equal numbers gives each half of the gradient, in a row that sees no key: left alone."""
    inputs = [*(x.requires_grad_() for x in operands(torch.float64)), keep()]
    function = FLOORED[name]
    out, report = run_compiled(function, *inputs, verify="off")
    halves = name in ("max with a tensor, behind a bias", "in bmm")
    assert report.ops["attention"] == (not halves)
    assert ("clamp(min=" in reasons_of(report, "recognize-attention")) == halves
    got, wanted = (torch.autograd.grad(x.square().sum(), inputs[:3]) for x in (out, function(*inputs)))
    torch.testing.assert_close(got, wanted)
