"""Tracing equal blocks once gives the graph that tracing everything gives, node for node."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.graph.block_cases import Deep, Layer, both_ways


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
