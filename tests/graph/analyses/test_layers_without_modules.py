"""Layers are found in models that have no modules for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from effopt.graph.analyses.layers import attention_of, stacks
from effopt.graph.capture import capture
from tests.graph.analyses.layer_cases import analysed, only
from tests.models.plain import Plain

WIDTH = 16


def weights(count: int, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    torch.manual_seed(0)
    return [[torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes] for _ in range(count)]


def attend(x: Tensor, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = F.linear(x, qkv).chunk(3, -1)
    scores = q @ k.transpose(-1, -2) * 0.25
    return (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(-1) @ v


BLOCK = ((3 * WIDTH, WIDTH), (32, WIDTH), (WIDTH, 32))


def pre_norm(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    for qkv, up, down in layers:
        x = x + attend(F.layer_norm(x, (WIDTH,)), qkv, mask)
        x = x + F.linear(F.relu(F.linear(F.layer_norm(x, (WIDTH,)), up)), down)
    return F.layer_norm(x, (WIDTH,))


def post_norm(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    x = F.layer_norm(x, (WIDTH,))
    for qkv, up, down in layers:
        x = F.layer_norm(x + attend(x, qkv), (WIDTH,))
        x = F.layer_norm(F.linear(F.relu(F.linear(x, up)), down) + x, (WIDTH,))
    return x.mean(1)


def parallel(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    for qkv, up, down in layers:
        h = F.layer_norm(x, (WIDTH,))
        x = attend(h, qkv) + F.linear(F.gelu(F.linear(h, up)), down) + x
    return x


def with_positions(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    """Each layer adds the same positions to what it attends to, and the stream starts with them too."""
    positions = torch.arange(x.shape[1] * WIDTH, dtype=x.dtype).view(x.shape[1], WIDTH).expand_as(x).cos()
    x = x + positions
    for qkv, up, down in layers:
        x = x + attend(F.layer_norm(x + positions, (WIDTH,)), qkv)
        x = x + F.linear(F.relu(F.linear(F.layer_norm(x, (WIDTH,)), up)), down)
    return x


@pytest.mark.parametrize("model", [pre_norm, post_norm, parallel, with_positions])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_models_without_modules(model: Callable[..., Tensor], training: bool) -> None:
    count = 4
    x, layers = torch.randn(2, 5, WIDTH, requires_grad=training), weights(count, *BLOCK)
    with torch.set_grad_enabled(training):
        seen = only(analysed(model, x, layers))
        (stack,) = seen.found
        assert seen.paths == [[f"layer {i}" for i in range(count)]]
        assert [len(attention_of(layer)) for layer in stack.layers] == [1] * count
        # A model of the first k layers gives what the k-th one gives.
        last = seen.values[stack.layers[-1].exit]
        end = (
            F.layer_norm(last, (WIDTH,))
            if model is pre_norm
            else last.mean(1)
            if model is post_norm
            else last
        )
        torch.testing.assert_close(end, model(x, layers), rtol=1e-4, atol=1e-5)
        for k, layer in enumerate(stack.layers[1:], 1):
            entered = seen.values[layer.entry]
            end = (
                F.layer_norm(entered, (WIDTH,)) if model is pre_norm
                else entered.mean(1) if model is post_norm else entered
            )  # fmt: skip
            torch.testing.assert_close(end, model(x, layers[:k]), rtol=1e-4, atol=1e-5)


def test_parameters_in_a_dictionary_and_stacked_in_one_tensor() -> None:
    def dictionary(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        return pre_norm(x, [[p[f"{name}{i}"] for name in "abc"] for i in range(3)])

    def stacked(x: Tensor, qkv: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return pre_norm(x, [[qkv[i], up[i], down[i]] for i in range(3)])

    layers = weights(3, *BLOCK)
    x = torch.randn(2, 5, WIDTH)
    named = {f"{name}{i}": w for i, layer in enumerate(layers) for name, w in zip("abc", layer, strict=True)}
    with torch.no_grad():
        assert only(analysed(dictionary, x, named)).paths == [["layer 0", "layer 1", "layer 2"]]
        joined = [torch.stack(column) for column in zip(*layers, strict=True)]
        assert only(analysed(stacked, x, *joined)).paths == [["layer 0", "layer 1", "layer 2"]]


def test_a_flat_module() -> None:
    with torch.no_grad():
        seen = only(analysed(Plain(5), input_ids=torch.randint(0, 100, (2, 7))))
    assert seen.paths == [[f"layer {i}" for i in range(5)]]


def test_two_flat_stacks_are_counted() -> None:
    def model(x: Tensor, memory: Tensor, encoder: list[list[Tensor]], decoder: list[list[Tensor]]) -> Tensor:
        memory = pre_norm(memory, encoder)
        for q, kv, up, down in decoder:
            k, v = F.linear(memory, kv).chunk(2, -1)
            y = (F.linear(F.layer_norm(x, (WIDTH,)), q) @ k.transpose(-1, -2)).softmax(-1) @ v
            x = x + y
            x = x + F.linear(F.relu(F.linear(F.layer_norm(x, (WIDTH,)), up)), down)
        return x

    encoder = weights(2, *BLOCK)
    decoder = weights(3, (WIDTH, WIDTH), (2 * WIDTH, WIDTH), *BLOCK[1:])
    with torch.no_grad():
        seen = only(analysed(model, torch.randn(2, 4, WIDTH), torch.randn(2, 5, WIDTH), encoder, decoder))
    assert seen.paths == [[f"stack {s} layer {i}" for i in range(n)] for s, n in ((0, 2), (1, 3))]


def test_results_of_layers_may_be_outputs() -> None:
    def model(x: Tensor, layers: list[list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        given = []
        for layer in layers:
            x = parallel(x, [layer])
            given += [x, F.layer_norm(x, (WIDTH,))]
        return x, given

    with torch.no_grad():
        seen = only(analysed(model, torch.randn(2, 5, WIDTH), weights(3, *BLOCK)))
    assert seen.paths == [["layer 0", "layer 1", "layer 2"]]


@pytest.mark.slow
def test_ten_thousand_nodes() -> None:
    x, layers = torch.randn(2, 5, WIDTH), weights(450, *BLOCK)
    held: list[GraphModule] = []

    def backend(module: GraphModule, example: Any) -> Callable[..., Any]:
        held.append(capture(module, example).module)
        return module.forward

    with torch.no_grad():
        torch.compile(pre_norm, backend=backend)(x, layers)
    assert len(held[0].graph.nodes) > 9000
    (stack,) = stacks(held[0].graph)
    assert len(stack.layers) == 450
