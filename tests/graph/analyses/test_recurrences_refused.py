"""Loops that only look like a linear recurrence, and what each is left alone for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effopt.graph.analyses.recurrences import recurrences
from tests.graph.analyses.recurrence_cases import Loop, found_in, graph_of, plain, read


def _nonlinear(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in range(4):
        h = torch.tanh(a[:, i] * h + u[:, i])
        ys.append(read(h, c, i))
    return torch.stack(ys, 1)


def _gaps(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in (0, 1, 3):
        h = a[:, i] * h + u[:, i]
        ys.append(read(h, c, i))
    return torch.stack(ys, 1)


def _state_of_a_step(a: Tensor, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    h, ys, kept = torch.zeros(2, 3, 4), [], u[:, 0]
    for i in range(4):
        h = a[:, i] * h + u[:, i]
        kept = h if i == 1 else kept
        ys.append(read(h, c, i))
    return torch.stack(ys, 1), kept


def _delta_rule(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in range(4):
        h = a[:, i] * h + u[:, i] * read(h, c, i)[..., None]
        ys.append(read(h, c, i))
    return torch.stack(ys, 1)


def _one_step_other(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in range(4):
        h = a[:, i] * h + (u[:, i].exp() if i == 3 else u[:, i])
        ys.append(read(h, c, i))
    return torch.stack(ys, 1)


def _shuffled(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in range(4):
        h = a[:, i] * h + u[:, i]
        ys.append(read(h, c, i))
    return torch.stack([ys[0], ys[2], ys[1], ys[3]], 1)


def _rounded(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in range(4):
        h = (a[:, i] * h + u[:, i]).bfloat16().float()
        ys.append(read(h, c, i))
    return torch.stack(ys, 1)


def _reads_the_future(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, hs = torch.zeros(2, 3, 4), []
    for i in range(4):
        h = a[:, i] * h + u[:, i]
        hs.append(h)
    late = c * h.sum()
    return torch.stack([read(h, late, i) for i, h in enumerate(hs)], 1)


def _random(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in range(4):
        h = a[:, i] * h + torch.dropout(u[:, i], 0.5, True)
        ys.append(read(h, c, i))
    return torch.stack(ys, 1)


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (_nonlinear, "its state goes through aten.tanh"),
        (_gaps, "0, 1, 3 of axis 1: not one after the other"),
        (_state_of_a_step, "is also read by output"),
        (_delta_rule, "depends on the state"),
        (_one_step_other, "collects 4 values, and the loop has 3 steps"),
        (_shuffled, "at 0, 2, 1, 3 of axis 1"),
        (_reads_the_future, "made of a state"),
        (_random, "random numbers"),
    ],
)
def test_look_alikes(loop: Loop, reason: str) -> None:
    found = found_in(loop)
    assert not found.recurrences
    assert any(reason in why.reason for why in found.misses), [why.reason for why in found.misses]


def test_a_state_that_is_rounded_in_each_step_is_none() -> None:
    assert not found_in(_rounded).recurrences


def test_a_residual_stream_is_no_loop_that_failed() -> None:
    def stream(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = x + torch.nn.functional.linear(x, w)
        return x

    found = recurrences(graph_of(stream, torch.randn(2, 8), *(torch.randn(8, 8) for _ in range(4))))
    assert not found.recurrences
    assert not found.misses


def _horner(a: Tensor, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return plain(a, u, c), ((0.1 * u + 0.2) * u + 0.3) * u + 0.4


def test_a_polynomial_is_no_loop_and_hides_none() -> None:
    found = found_in(_horner)
    assert [one.steps for one in found.recurrences] == [4]
    assert not found.misses
