"""Symbolic sizes stay symbolic: right results for every size, and no more graphs than Dynamo itself makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from effopt.compile import effopt, record


def attention(x):
    q = x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    return y.transpose(1, 2).reshape(x.shape)


def slices(x):
    y = torch.zeros_like(x)
    y[:, : x.shape[1] // 2] = x[:, : x.shape[1] // 2]
    return y + x[:, -1:], x.shape[1] + 1


def written(x):
    x[:, -1] = 0
    x.mul_(2)
    return x.sum(1), x.transpose(0, 1)


def concatenated(x):
    return torch.cat([x, x * 2], dim=1).flatten(0, 1), x.new_zeros(x.shape[1])


def broadcast_copy(x):
    y = x.new_empty(3, x.shape[0], x.shape[1], x.shape[2])
    y.copy_(x)
    return y


FUNCTIONS = (attention, slices, written, concatenated, broadcast_copy)
SIZES = ((2, 6), (2, 9), (3, 4), (5, 11))


def run_all(function: Callable[..., Any], call: Callable[..., Any]) -> list[Any]:
    results = []
    for b, t in SIZES:
        torch.manual_seed(b * t)
        x = torch.randn(b, t, 8)
        results.append((call(x), x))
    return results


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_size_with_the_graphs_of_dynamo(function: Callable[..., Any], dynamic: bool | None) -> None:
    expected = run_all(function, function)
    plain = []

    def counting(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        plain.append(module)
        return module.forward

    run_all(function, torch.compile(function, backend=counting, dynamic=dynamic))
    torch._dynamo.reset()
    with record() as report:
        options = {"lowering": "eager"}
        got = run_all(function, torch.compile(function, backend=effopt, dynamic=dynamic, options=options))
    assert not [g.refused for g in report.graphs if g.refused]
    assert len(report.graphs) == len(plain)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_marked_dimension_is_not_specialised() -> None:
    x = torch.randn(2, 6, 8)
    torch._dynamo.mark_dynamic(x, 1)
    compiled = torch.compile(attention, backend=effopt, options={"lowering": "eager"})
    with record() as report:
        torch.testing.assert_close(compiled(x), attention(x))
        y = torch.randn(2, 13, 8)
        torch.testing.assert_close(compiled(y), attention(y))
    assert len(report.graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_through_inductor(function: Callable[..., Any]) -> None:
    expected = run_all(function, function)
    got = run_all(function, torch.compile(function, backend=effopt, dynamic=True))
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
