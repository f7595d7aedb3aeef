"""Scores that a view splits for a mask or bias, and joins again: windows of a Swin, axes of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.passes.canonicalize.recognize_attention import RecognizeAttention
from tests.passes.conftest import reasons_of, run_compared, run_compiled

IMAGES, WINDOWS, HEADS, T, D = 2, 3, 4, 6, 8
"""Six queries and keys are a grid of 2 rows and 3 columns."""


def operands(*lead: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*lead, T, D) for _ in range(3)]


def weighed(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def in_windows(scores: Tensor) -> Tensor:
    return scores.view(IMAGES, WINDOWS, HEADS, T, T)


def whole(scores: Tensor) -> Tensor:
    return scores.view(IMAGES * WINDOWS, HEADS, T, T)


def of_windows() -> Tensor:
    bias = torch.randn(WINDOWS, T, T, generator=torch.Generator().manual_seed(1))
    return bias.masked_fill(bias > 1.0, -100.0)


WINDOWED: dict[str, Callable[..., Tensor]] = {
    "one bias": lambda s, w: whole(in_windows(s) + w[:, None]),
    "twice, with a leading 1": lambda s, w: whole(in_windows(s) + w[None, :, None] + w[None, :, None]),
    "behind a bias of heads": lambda s, w: whole(
        in_windows(s * 0.3 + w[0] * torch.ones(HEADS, 1, 1)) + w[:, None]
    ),
    "a bias of heads behind it": lambda s, w: (
        whole(in_windows(s) + w[:, None]) + torch.ones(HEADS, 1, 1) * w[0]
    ),
    "of all windows alike": lambda s, w: whole(in_windows(s) + w[None, :1, None]),
    "of each head": lambda s, w: whole(in_windows(s) + w[:, None] * torch.arange(4.0)[:, None, None]),
    "of each image": lambda s, w: whole(in_windows(s) + torch.tensor([1.0, 2.0]).view(-1, 1, 1, 1, 1) * w[0]),
    "of keys": lambda s, w: whole(in_windows(s) + w[0, 0]),
    "a mask": lambda s, w: whole(in_windows(s).masked_fill(w[:, None] < 0.0, -1e4)),
    "two masks": lambda s, w: whole(in_windows(s).masked_fill(w[:, None] < 0.0, -1e4)).masked_fill(
        w[0] > 1.0, -1e4
    ),
    "scaled there": lambda s, w: whole((in_windows(s) + w[:, None]) * 0.5),
    "softmax while split": lambda s, w: in_windows(s) + w[:, None],
}


@pytest.mark.parametrize("name", WINDOWED)
def test_batch_of_windows(name: str) -> None:
    q, k, v = operands(IMAGES * WINDOWS, HEADS)

    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return whole(WINDOWED[name](q @ k.mT, w).softmax(-1)) @ v

    _, report = run_compared(function, q, k, v, of_windows())
    assert report.ops["attention"] == 1, report.rejected


def test_batch_of_windows_with_a_symbolic_number_of_images() -> None:
    q, k, v = operands(IMAGES * WINDOWS, HEADS)

    def function(images: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        q, k, v = (x.expand(images.shape[0], *x.shape).flatten(0, 1) for x in (q, k, v))
        scores = (q @ k.mT).view(images.shape[0], -1, HEADS, T, T) + w.repeat(2, 1, 1)[:, None]
        return weighed(scores.view(-1, HEADS, T, T), v)

    images = torch.zeros(5)
    torch._dynamo.mark_dynamic(images, 0)
    _, report = run_compared(function, images, q, k, v, of_windows())
    assert report.ops["attention"] == 1, report.rejected


def rows_and_columns(scores: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """As ViTDet and Segment Anything add their decomposed relative positions."""
    split = scores.view(-1, 2, 3, 2, 3)
    return (split + along[:, :, :, :, None] + across[:, :, :, None, :]).view(-1, T, T)


def of_axes(n: int) -> list[Tensor]:
    return [torch.randn(n, 2, 3, 2), torch.randn(n, 2, 3, 3)]


def test_grid_with_a_bias_of_each_axis() -> None:
    q, k, v = operands(5)
    function = lambda q, k, v, a, b: weighed(rows_and_columns(q * 0.3 @ k.mT, a, b), v)  # noqa: E731
    _, report = run_compared(function, q, k, v, *of_axes(5))
    assert report.ops["attention"] == 1, report.rejected


def test_grid_whose_heads_come_apart_afterwards() -> None:
    q, k, v = operands(8)
    bias = torch.randn(2, 1, T, T)

    def function(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        scores = rows_and_columns(q @ k.mT, a, b).view(2, 4, T, T) + bias
        return weighed(scores.view(8, T, T), v)

    _, report = run_compared(function, q, k, v, *of_axes(8), bias)
    assert report.ops["attention"] == 1, report.rejected


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in (*operands(5), *of_axes(5))]
    function = lambda q, k, v, a, b: weighed(rows_and_columns(q @ k.mT, a, b), v)  # noqa: E731
    out, report = run_compiled(function, *inputs)
    assert report.ops["attention"] == 1, report.rejected
    direction = torch.randn_like(out)
    got = torch.autograd.grad((out * direction).sum(), inputs)
    wanted = torch.autograd.grad((function(*inputs) * direction).sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def split(s: Tensor) -> Tensor:
    return s.view(-1, T, 2, 3)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "softmax over a part of the keys": (
        lambda q, k, v: split(q @ k.mT).softmax(-1).view(-1, T, T) @ v,
        "softmax is taken over a part of the keys",
    ),
    "the greatest of a part of the keys": (
        lambda q, k, v: weighed(((s := split(q @ k.mT)) - s.max(-1, keepdim=True).values).view(-1, T, T), v),
        "while rows or keys are split",
    ),
    "scaled by a part of the keys": (
        lambda q, k, v: weighed((split(q @ k.mT) * v[:, :, :2, None]).view(-1, T, T), v),
        "a tensor scales the scores after",
    ),
    "rows and keys exchanged": (
        lambda q, k, v: weighed((q @ k.mT).view(-1, 3, 12).view(-1, T, T) + v[:, :1, :T], v),
        "rows or keys move",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_look_alike_is_left_alone(name: str) -> None:
    function, reason = REFUSED[name]
    _, report = run_compared(function, *operands(5))
    assert report.ops["attention"] == 0
    assert reason in reasons_of(report, RecognizeAttention.name)


def test_weights_that_are_permuted_while_split_are_left_alone() -> None:
    """Window 0 of image 1 would be weighed by window 1 of image 0."""

    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        scores = (in_windows(q @ k.mT) + w[:, None]).transpose(0, 1)
        return weighed(scores.reshape(-1, HEADS, T, T), v)

    _, report = run_compared(function, *operands(IMAGES * WINDOWS, HEADS), of_windows())
    assert report.ops["attention"] == 0
