"""Numbers of layers that are captured in blocks: inputs, attributes, and what is computed from sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from effopt.graph import capture as capturing
from effopt.graph.capture_blocks import export_in_blocks
from tests.graph.block_cases import Deep, Layer, both_ways


class Scaled(Layer):
    """With a number of its own, which `dynamic=True` makes an input of the graph."""

    def __init__(self, number: float, asks: bool = False) -> None:
        super().__init__(8, 0.0)
        self.number, self.asks = number, asks

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = super().forward(x * self.number, scale)
        return torch.nn.functional.leaky_relu(x, self.number) if self.asks else x - self.number


class DeepScaled(Deep):
    def __init__(self, numbers: list[float], asks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled(number, asks) for number in numbers)


@pytest.mark.parametrize("training", [False, True])
def test_numbers_that_are_inputs_do_not_cut_blocks(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = DeepScaled([0.5] * 6).train(training), torch.randn(3, 8)
    with torch.set_grad_enabled(training):
        once, whole, used = both_ways(model, x, monkeypatch=monkeypatch, dynamic=True)
    assert used
    assert once == whole


@pytest.mark.parametrize("asks", [False, True], ids=["symbolic", "known"])
def test_each_layer_keeps_the_number_that_is_its_own(asks: bool) -> None:
    """Equal when compiled, and changed in one layer after: nothing of the first layer's may hold for it."""
    torch.manual_seed(0)
    model, x = DeepScaled([0.5] * 6, asks).eval(), torch.randn(3, 8)
    compiled = torch.compile(model, backend="effopt", dynamic=True, options={"lowering": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        for layer in (2, 0):
            model.layers[layer].number = 0.25
            torch.testing.assert_close(compiled(x), model(x))


def test_a_number_that_the_model_asked_for_is_not_that_of_other_layers() -> None:
    """Dynamo settles it when it is compared: a constant in the first layer, still an input in the others."""

    class Asking(DeepScaled):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x + 1.0 if self.layers[0].number == 0.5 else x)

    torch.manual_seed(0)
    model, x = Asking([0.5] * 6).eval(), torch.randn(3, 8)
    compiled = torch.compile(model, backend="effopt", dynamic=True, options={"lowering": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        model.layers[2].number = 0.25
        torch.testing.assert_close(compiled(x), model(x))


def test_layers_of_other_numbers_are_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = DeepScaled([0.5, 0.25] * 4).eval(), torch.randn(3, 8)
    with torch.no_grad():
        once, whole, _ = both_ways(model, x, monkeypatch=monkeypatch, dynamic=True)
        assert once == whole
        compiled = torch.compile(model, backend="effopt", dynamic=True, options={"lowering": "eager"})
        torch.testing.assert_close(compiled(x), model(x))


_PI = math.pi


class Reshaping(Layer):
    """Uses whole shapes, computes with sizes, and takes the root of a number: its own, or the program's."""

    def __init__(self, own: bool, factor: int) -> None:
        super().__init__(8, 0.0)
        self.number, self.own, self.factor = 0.5, own, factor

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        flat = super().forward(flat, scale) / (self.factor * x.shape[1] - 1)
        flat = flat.view((*flat.size()[:-1], 4, 2)).tanh().flatten(1)
        return x + math.sqrt(2 / (self.number if self.own else _PI)) * flat.view(x.size())


class DeepReshaping(Deep):
    def __init__(self, own: bool = False, factors: Sequence[int] = (2,) * 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Reshaping(own, factor) for factor in factors)


@pytest.mark.parametrize("training", [False, True])
def test_computed_numbers_do_not_cut_blocks(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []

    def counting(module: GraphModule, inputs: list[Any]) -> Any:
        traced.append(sum(n.op.startswith("call") for n in module.graph.nodes))
        return trace(module, inputs)

    trace = capturing._trace
    monkeypatch.setattr(capturing, "_trace", counting)
    model, x = DeepReshaping().train(training), torch.randn(3, 5, 8)
    with torch.set_grad_enabled(training):
        once, whole, used = both_ways(model, x, monkeypatch=monkeypatch, dynamic=True)
    assert used
    assert once == whole
    body, outer, everything = traced
    assert body + outer < everything / 2


@pytest.mark.parametrize(
    ("own", "factors"), [(False, (2,) * 4), (True, (2, 3) * 2)], ids=["one-formula", "a-number-a-layer"]
)
def test_computed_numbers_are_right_for_every_size(
    own: bool, factors: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = DeepReshaping(own, factors)
    once, whole, _ = both_ways(model, torch.randn(3, 5, 8), monkeypatch=monkeypatch, dynamic=True)
    assert once == whole
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="effopt", dynamic=True, options={"lowering": "eager"})
    for shape in ((3, 5, 8), (5, 2, 8)):
        x = torch.randn(shape)
        got, wanted = (
            torch.autograd.grad(m(x)[0].square().sum(), [*model.parameters()]) for m in (compiled, model)
        )
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    model.layers[2].number = 0.25
    torch.testing.assert_close(compiled(x)[0], model(x)[0], rtol=1e-5, atol=1e-5)


def test_a_number_that_tracing_settles_is_traced_whole() -> None:
    """What was found out of the first copy's number is guarded for that one alone."""
    graphs: list[Any] = []

    def settling(module: GraphModule, inputs: list[Any]) -> tuple[GraphModule, Any]:
        for number in (i for i in inputs if isinstance(i, torch.SymFloat)):
            assert number > -1  # asks, as the shape function of an operator may
        return capturing._trace(module, inputs)

    def backend(module: GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(export_in_blocks(module, list(example), settling))
        return module.forward

    with torch.no_grad():
        torch.compile(DeepScaled([0.5] * 6).eval(), backend=backend, dynamic=True)(torch.randn(3, 8))
    assert graphs == [None]
