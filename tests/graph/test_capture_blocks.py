"""Tracing equal blocks once gives the graph that tracing everything gives, node for node."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.node import map_arg

from effopt.graph import capture as capturing
from effopt.graph.capture import Captured, capture
from effopt.graph.capture_blocks import export_in_blocks


def listing(captured: Captured) -> list[Any]:
    """Everything that a pass could see of a graph, with positions for nodes."""
    position = {node: i for i, node in enumerate(captured.module.graph.nodes)}
    lines = []
    for node in captured.module.graph.nodes:
        arguments = map_arg((node.args, node.kwargs), lambda operand: f"%{position[operand]}")
        target = "" if node.op in ("placeholder", "get_attr") else str(node.target)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        lines.append(
            (node.op, target, repr(arguments), str(node.meta.get("val")), stack, node.meta.get("stack_trace"))
        )
    return [*lines, captured.mutated, captured.outputs]


def both_ways(
    function: Callable[..., Any], *inputs: Any, monkeypatch: pytest.MonkeyPatch, dynamic: bool | None = None
) -> tuple[Any, Any, bool]:
    """The listing with blocks traced once, the listing of the whole trace, and whether blocks were used."""
    found: list[Any] = []
    used: list[bool] = []

    def watched(*args: Any) -> Any:
        result = export_in_blocks(*args)
        used.append(result is not None)
        return result

    def backend(module: GraphModule, example: Any) -> Callable[..., Any]:
        with monkeypatch.context() as patch:
            patch.setattr(capturing, "export_in_blocks", watched)
            found.append(listing(capture(module, example)))
            patch.setattr(capturing, "export_in_blocks", lambda *_: None)
            found.append(listing(capture(module, example)))
        return module.forward

    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return found[0], found[1], used[0]


class Layer(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.second, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        gate, up = self.first(self.norm(x)).chunk(2, -1)
        kept = torch.zeros_like(up)
        kept[..., 1:] = up[..., 1:]
        h = torch.nn.functional.silu(gate) * kept * scale
        for _ in range(3):
            h = torch.tanh(h) + 0.1
        return x + self.dropout(self.second(h))


class Deep(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(8, dropout) for _ in range(6))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().mean()
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, scale)
        return self.dropout(x), scale


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_same_graph(training: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Deep(dropout).train(training)
    with torch.set_grad_enabled(training):
        once, whole, used = both_ways(model, torch.randn(3, 8), monkeypatch=monkeypatch)
    assert used
    assert once == whole


def test_layers_keep_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        once, _, _ = both_ways(Deep().eval(), torch.randn(3, 8), monkeypatch=monkeypatch)
    stacks = str([line[4] for line in once[:-2]])
    assert all(f"layers.{i}." in stacks or f"layers[{i}]" in stacks for i in range(6))


def test_a_block_that_writes_into_an_operand_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor, caches: list[Tensor]) -> Tensor:
        for cache in caches:
            h = x
            for _ in range(6):
                h = torch.tanh(torch.sin(h) * 0.5 + 1.0)
            cache.copy_(h)
            x = x + cache.exp()
        return x

    with torch.no_grad():
        caches = [torch.zeros(3, 8) for _ in range(5)]
        once, whole, used = both_ways(model, torch.randn(3, 8), caches, monkeypatch=monkeypatch)
    assert not used
    assert once == whole


def test_a_result_written_later_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The write, outside the blocks, changes what the next block reads."""

    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for i, w in enumerate(weights):
            h = x @ w
            for _ in range(8):
                h = torch.tanh(torch.sin(h) * 0.5 + 1.0)
            x = x + h
            if i == 2:
                x.mul_(2.0)
        return x

    with torch.no_grad():
        weights = [torch.randn(8, 8) for _ in range(6)]
        once, whole, _ = both_ways(model, torch.randn(3, 8), *weights, monkeypatch=monkeypatch)
    assert once == whole


def test_a_small_graph_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        once, whole, used = both_ways(lambda x: torch.tanh(x).sin(), torch.randn(3), monkeypatch=monkeypatch)
    assert not used
    assert once == whole


@pytest.mark.parametrize("write", ["whole", "slice", "view", "buffer"])
def test_an_operand_written_after_the_blocks_is_traced_whole(
    write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks read the value from before the write."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(8, 0.0) for _ in range(6))
            self.register_buffer("count", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            scale = self.count if write == "buffer" else x.mean(0) * 2
            part = scale[:4]
            for layer in self.layers:
                x = layer(x, scale)
            if write == "slice":
                scale[2:] = 7.0
            elif write == "view":
                part.mul_(3.0)
            else:
                scale.add_(1.0)
            return x

    with torch.no_grad():
        once, whole, used = both_ways(Late().eval(), torch.randn(3, 8), monkeypatch=monkeypatch)
    assert not used
    assert once == whole


def test_operands_that_are_one_value_in_the_first_copy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        start = x.sin()
        x = start
        for w in weights:
            h = torch.tanh((x + start).cos() @ w).sigmoid() @ w
            h = torch.relu(h.exp() * h.sin() + h.tanh() @ w).cos() * 0.1
            x = x + torch.relu(h).exp() * 0.5
        return x

    inputs = (torch.randn(3, 8), *(torch.randn(8, 8) for _ in range(4)))
    in_blocks, whole, used = both_ways(model, *inputs, monkeypatch=monkeypatch)
    assert used
    assert in_blocks == whole


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
