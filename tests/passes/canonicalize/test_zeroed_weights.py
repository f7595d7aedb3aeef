"""Weights that are set to 0 where their scores are masked, as DeBERTa's softmax and ESPnet's layers do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.passes.canonicalize.recognize_attention import RecognizeAttention
from tests.passes.conftest import reasons_of, run_compared, run_compiled

LOWEST = torch.finfo(torch.float32).min
INF = float("inf")


def operands() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, n, 8) for n in (5, 7, 7)]


def keep() -> Tensor:
    """Some keys; the third row sees none."""
    seen = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    seen[..., 0] = True
    seen[0, 0, 2] = False
    return seen


ZEROED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lowest": lambda s, m: s.masked_fill(h := ~m, LOWEST).softmax(-1).masked_fill(h, 0),
    "-inf": lambda s, m: s.masked_fill(h := m == 0, -INF).softmax(-1).masked_fill(h, 0.0),
    "where": lambda s, m: torch.where(m, torch.where(m, s, LOWEST).softmax(-1), 0.0),
    "a number in a tensor": lambda s, m: (
        s.masked_fill(h := ~m, torch.tensor(LOWEST)).softmax(-1).masked_fill(h, torch.tensor(0))
    ),
    "of not hidden and of hidden": lambda s, m: torch.where(m, s, -1e32).softmax(-1).masked_fill(~m, 0),
    "behind a bias": lambda s, m: (
        (s + m[..., :1].float()).masked_fill(h := ~m, LOWEST).softmax(-1).masked_fill(h, 0)
    ),
    "in place": lambda s, m: s.masked_fill(h := ~m, LOWEST).softmax(-1).masked_fill_(h, 0),
    "after dropout that is off": lambda s, m: F.dropout(
        s.masked_fill(h := ~m, LOWEST).softmax(-1), 0.5, False
    ).masked_fill(h, 0),
}


@pytest.mark.parametrize("name", ZEROED)
def test_row_without_a_key_gives_zero(name: str) -> None:
    function = lambda q, k, v, m: ZEROED[name](q @ k.mT * 0.3, m) @ v  # noqa: E731
    out, report = run_compared(function, *operands(), keep())
    assert report.ops["attention"] == 1, report.rejected
    assert (out[0, :, 2] == 0).all()


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in operands()]
    function = lambda q, k, v, m: ZEROED["lowest"](q @ k.mT * 0.3, m) @ v  # noqa: E731
    out, report = run_compiled(function, *inputs, keep())
    assert report.ops["attention"] == 1, report.rejected
    direction = torch.randn_like(out)
    got = torch.autograd.grad((out * direction).sum(), inputs)
    wanted = torch.autograd.grad((function(*inputs, keep()) * direction).sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "another mask": (
        lambda s, m: s.masked_fill(~m, LOWEST).softmax(-1).masked_fill(~m.roll(1, -1), 0),
        "by another mask",
    ),
    "what is seen": (lambda s, m: s.masked_fill(~m, LOWEST).softmax(-1).masked_fill(m, 0), "by another mask"),
    "no mask before": (lambda s, m: s.softmax(-1).masked_fill(~m, 0), "by another mask"),
    "one of two masks": (
        lambda s, m: s.masked_fill(~m, LOWEST).masked_fill(s > 2, LOWEST).softmax(-1).masked_fill(~m, 0),
        "by another mask",
    ),
    "a bias behind the mask": (
        lambda s, m: (s.masked_fill(~m, -1e32) + m.float()).softmax(-1).masked_fill(~m, 0),
        "by another mask",
    ),
    "a fill that scores reach": (
        lambda s, m: s.masked_fill(h := ~m, -1.0).softmax(-1).masked_fill(h, 0),
        "masked scores are -1.0",
    ),
    "set to another number": (
        lambda s, m: s.masked_fill(h := ~m, LOWEST).softmax(-1).masked_fill(h, 1e-6),
        "no form that this pass knows",
    ),
    "heads that are merged in between": (
        lambda s, m: (
            (
                s.masked_fill(h := ~m[:, :, :, :], LOWEST)
                .flatten(0, 1)
                .softmax(-1)
                .view(2, 4, 5, 7)
                .flatten(0, 1)
            )
            .masked_fill(h[:1, 0], 0)
            .view(2, 4, 5, 7)
        ),
        "by another mask",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_look_alike_is_left_alone(name: str) -> None:
    form, reason = REFUSED[name]
    function = lambda q, k, v, m: form(q @ k.mT * 0.3, m) @ v  # noqa: E731
    _, report = run_compared(function, *operands(), keep())
    assert report.ops["attention"] == 0
    assert reason in reasons_of(report, RecognizeAttention.name), report.rejected
