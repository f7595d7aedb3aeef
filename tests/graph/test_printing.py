"""Listings of graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from effopt.graph.capture import capture
from effopt.graph.printing import lines, listing, nodes_under, repeated_layer, type_of


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x)[:, 1:].relu().sum(-2, keepdim=True) * 0.25)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _captured() -> GraphModule:
    found: list[GraphModule] = []

    def backend(module: GraphModule, example: list[Tensor]) -> object:
        found.append(capture(module, example).module)
        return module.forward

    with torch.no_grad():
        torch.compile(_Model(), backend=backend)(torch.randn(2, 3, 4))
    return found[0]


def test_the_repeated_layer_is_found_and_listed() -> None:
    graph = _captured().graph
    assert repeated_layer(graph) == "layers.1"
    listed = lines(nodes_under(graph, "layers.1"))
    assert [line.op for line in listed] == ["linear", "slice", "relu", "sum", "mul", "linear", "add"]
    assert listed[0].layer == "layers.1.up"
    assert listed[1].text.endswith(", 1, 1, end)")
    assert "f32[2, 3, 8] = linear(" in listed[0].text
    assert not any(line.is_canonical for line in listed)


def test_a_listing_tells_apart_what_a_line_hides() -> None:
    module = _captured()
    text = listing(module)
    assert text == listing(module.graph)
    assert "aten.relu.default(" in text
    assert "float32[2, 3, 8]  # layers.0.up" in text
    assert len(text.splitlines()) == len(module.graph.nodes)
    (relu, *_) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    shown = lines([relu])
    relu.kwargs = {"memory_format": torch.channels_last}
    assert lines([relu]) == shown
    assert listing(module) != text


def test_types() -> None:
    assert type_of(torch.empty(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert type_of((torch.empty(1), 3)) == "(f32[1], i64)"
    assert type_of(torch.empty((), dtype=torch.bool)) == "bool[]"
    assert type_of(None) == "NoneType"
