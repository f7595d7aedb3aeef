"""Packed weights: right, refused in training, and never stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from effopt.compile import effopt, record
from effopt.passes.fusion.pack_projections import PackProjections


class Projections(nn.Module):
    def __init__(self, biases: tuple[bool, ...] = (False, False, False)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, n, bias=b) for n, b in zip((16, 8, 8), biases, strict=True))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def compile_packed(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(
        model, backend=effopt, options={"lowering": "eager", "passes": "pack-projections"}, fullgraph=True
    )


def assert_current(compiled: Callable[..., Any], model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        for got, want in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(got, want)


def write_in_place(model: Projections) -> None:
    with torch.no_grad():
        model.layers[1].weight.mul_(2)


def load(model: Projections) -> None:
    model.load_state_dict(Projections().state_dict())


def load_by_assignment(model: Projections) -> None:
    model.load_state_dict(Projections().state_dict(), assign=True)


def step(model: Projections) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sum(out.square().sum() for out in model(torch.randn(3, 24))).backward()
    optimizer.step()


def replace_parameter(model: Projections) -> None:
    model.layers[0].weight = nn.Parameter(torch.randn(16, 24))


def replace_data(model: Projections) -> None:
    model.layers[2].weight.data = torch.randn(8, 24)


@pytest.mark.parametrize(
    "change", [write_in_place, load, load_by_assignment, step, replace_parameter, replace_data]
)
def test_changed_weights_are_packed_again(change: Callable[[Projections], None]) -> None:
    model, x = Projections(), torch.randn(2, 5, 24)
    compiled = compile_packed(model)
    with record() as report:
        assert_current(compiled, model, x)
    assert report.counts["pack-projections"] == 1
    change(model)
    assert_current(compiled, model, x)
    change(model)
    assert_current(compiled, model, x)


@pytest.mark.parametrize("biases", [(True, True, True), (True, False, True), (False, False, True)])
def test_layers_with_and_without_bias_are_packed_apart(biases: tuple[bool, ...]) -> None:
    model, x = Projections(biases), torch.randn(2, 5, 24)
    with record() as report:
        assert_current(compile_packed(model), model, x)
    assert report.counts["pack-projections"] == 1
    alone = [r.reason for r in report.rejected if r.pass_name == "pack-projections"]
    assert len(alone) == (0 if all(biases) else 1)


def test_training_is_refused() -> None:
    model = Projections()
    with record() as report:
        compile_packed(model)(torch.randn(2, 24))
    assert report.counts["pack-projections"] == 0
    assert any("must stay leaves" in r.reason for r in report.rejected)


def test_only_when_asked_for() -> None:
    assert not PackProjections.default
