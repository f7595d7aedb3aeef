"""Autocast, ambient and of regions: values, dtypes and gradients are those of eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effopt.compile import effopt
from effopt.graph.values import val
from tests.graph.capture_cases import assert_as_in_eager, make


@contextmanager
def half():
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def half_without_gradients():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


class Regions(nn.Module):
    """One way to come by a cast in each method. Weights are leaves, which autocast caches."""

    def __init__(self, body: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return getattr(self, self.body)(x)

    def linear(self, x):
        return self.first(x)

    def one_weight_twice(self, x):
        return self.first(self.first(x).relu()) * x

    def matmuls(self, x):
        return x @ self.first.weight, torch.bmm(x[None], self.first.weight[None]), torch.mm(x, x.t())

    def einsum(self, x):
        return torch.einsum("ij,kj->ik", x, self.first.weight)

    def attention(self, x):
        q, k, v = (self.first(x)[None, None] for _ in range(3))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(4, 4))

    def spelled_attention(self, x):
        q = self.first(x)
        weights = F.softmax(q @ q.t(), dim=-1, dtype=torch.float32).to(q.dtype)
        return weights @ q

    def norm_and_loss(self, x):
        return F.mse_loss(self.norm(self.first(x)), torch.ones(4, 8)), F.cross_entropy(
            self.first(x), x.argmax(-1)
        )

    def convolution(self, x):
        return F.conv1d(x[None], self.first.weight[:4, :4, None])

    def switched_off(self, x):
        y = self.first(x)
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ self.first.weight
            angles = torch.outer(z[0], z[1]).cos()
        return self.first(z), angles

    def switched_on(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
        return y.float() + 1, y, self.first(x)

    def nested(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
            with torch.autocast("cpu", enabled=False):
                z = self.first(x)
            w = self.first(z)
        return y, z, w

    def double(self, x):
        return x.double() @ self.first.weight.double()

    def concatenated(self, x):
        return torch.cat([x, self.first(x).to(torch.bfloat16)])

    def written_in_place(self, x):
        y = torch.zeros(4, 8, dtype=torch.bfloat16)
        y[:2] = self.first(x)[:2]
        return y

    def without_gradient(self, x):
        with torch.no_grad():
            y = self.first(x)
        return y + self.first(x)


BODIES = [
    name for name, value in vars(Regions).items() if callable(value) and name[0] != "_" and name != "forward"
]


@pytest.mark.parametrize("around", [half, half_without_gradients, torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("body", BODIES)
def test_as_in_eager(body: str, around: Callable[[], Any]) -> None:
    assert_as_in_eager(Regions(body), make((4, 8), grad=True), around=around)


@pytest.mark.parametrize("body", ["switched_off", "switched_on", "one_weight_twice"])
@pytest.mark.parametrize("around", [half, torch.enable_grad])
def test_as_in_eager_through_inductor(body: str, around: Callable[[], Any]) -> None:
    assert_as_in_eager(Regions(body), make((4, 8), grad=True), around=around, lowering="auto", rtol=2e-2)


def test_casts_are_nodes_and_leaves_are_cast_once() -> None:
    from effopt.graph.capture import capture

    seen = []

    def look(module, inputs):
        seen.append(capture(module, inputs).module.graph)
        return module.forward

    with half():
        torch.compile(Regions("one_weight_twice"), backend=look)(torch.randn(4, 8))
    (graph,) = seen
    linears = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len(linears) == 2
    for node in linears:
        assert all(val(a).dtype == torch.bfloat16 for a in node.args)
    assert linears[0].args[1] is linears[1].args[1]


def test_backward_outside_of_autocast() -> None:
    model, x = Regions("switched_off"), torch.randn(4, 8)
    with half():
        compiled = torch.compile(model, backend=effopt, options={"lowering": "eager"})
        sum(o.float().sum() for o in compiled(x)).backward()
        got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        sum(o.float().sum() for o in model(x)).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
