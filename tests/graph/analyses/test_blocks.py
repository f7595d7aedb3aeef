"""Repeated blocks are found by structure, and only where they are equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from effopt.graph.analyses.blocks import blocks
from effopt.graph.capture import capture


def normal_form(function: Callable[..., Any], *inputs: Any) -> Graph:
    held: list[GraphModule] = []

    def backend(module: GraphModule, example: Any) -> Callable[..., Any]:
        held.append(capture(module, example).module)
        return module.forward

    with torch.no_grad():
        torch.compile(function, backend=backend)(*inputs)
    return held[0].graph


def layer(x: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
    return x + torch.relu(h @ w) * 0.5


def test_a_loop_without_modules_is_one_block_repeated() -> None:
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = layer(x, w)
        return x

    (run,) = blocks(normal_form(model, torch.randn(3, 8), *(torch.randn(8, 8) for _ in range(5)))).runs
    assert len(run.instances) == 5
    targets = [[n.target for n in instance] for instance in run.instances]
    assert all(t == targets[0] for t in targets)
    assert len({n for instance in run.instances for n in instance}) == 5 * len(run.instances[0])


def test_a_different_constant_stays_outside() -> None:
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for i, w in enumerate(weights):
            x = layer(x, w) * (2.0 if i == 2 else 3.0)
        return x

    found = blocks(normal_form(model, torch.randn(3, 8), *(torch.randn(8, 8) for _ in range(6)))).runs
    assert sorted(len(run.instances) for run in found) == [2, 4]
    for run in found:
        assert 2.0 not in [a for instance in run.instances for n in instance for a in n.args]
        first = [(n.target, [a for a in n.args if isinstance(a, float)]) for n in run.instances[0]]
        for instance in run.instances:
            assert [(n.target, [a for a in n.args if isinstance(a, float)]) for n in instance] == first


def test_equal_steps_with_other_wiring_are_not_one_block() -> None:
    """The second copy reads the value before last: the same ops and shapes, another function."""

    def model(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = torch.relu(torch.tanh(torch.sigmoid(x @ a)) + x).exp().sin().cos()
        return torch.relu(torch.tanh(torch.sigmoid(y @ b)) + x).exp().sin().cos()

    graph = normal_form(model, torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4))
    for run in blocks(graph, smallest=9).runs:
        assert len(run.instances) < 2, run


def test_alternating_layers_are_one_block_of_two() -> None:
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for i, w in enumerate(weights):
            x = layer(x, w) if i % 2 else torch.sigmoid(layer(x.exp(), w)) - 1.0
        return x

    run = blocks(normal_form(model, torch.randn(3, 8), *(torch.randn(8, 8) for _ in range(6)))).runs[0]
    assert len(run.instances) == 3
    assert sum(n.target is torch.ops.aten.matmul.default for n in run.instances[0]) == 2


def test_barriers_cut_blocks_and_the_parts_still_repeat() -> None:
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = layer(x, w).sort(-1).values
        return x

    graph = normal_form(model, torch.randn(3, 8), *(torch.randn(8, 8) for _ in range(5)))
    sorts = frozenset(n for n in graph.nodes if n.target is torch.ops.aten.sort.default)
    found = blocks(graph, barriers=sorts).runs
    inside = {n for run in found for instance in run.instances for n in instance}
    assert not inside & sorts
    assert max(len(run.instances) for run in found) >= 4


def test_marked_nodes_differ_from_unmarked_ones() -> None:
    def model(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = layer(x, w)
        return x

    graph = normal_form(model, torch.randn(3, 8), *(torch.randn(8, 8) for _ in range(4)))
    products = [n for n in graph.nodes if n.target is torch.ops.aten.matmul.default]
    later = {products[2], products[3]}
    for run in blocks(graph, marked=frozenset(later)).runs:
        for copies in zip(*run.instances, strict=True):
            assert len({node in later for node in copies}) == 1
