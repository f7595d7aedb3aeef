"""Listings of graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from effopt.graph.capture import capture
from effopt.graph.printing import Line, diff, dump, lines, nodes_under, repeated_layer, type_of


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


def test_dump_shows_inputs_layers_sources_and_outputs() -> None:
    text = dump(_captured())
    assert "= input" in text
    assert "# layers.2.down  " in text
    assert "test_printing.py:" in text
    assert text.splitlines()[-1].startswith("return [%add")


def test_types() -> None:
    assert type_of(torch.empty(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert type_of((torch.empty(1), 3)) == "(f32[1], i64)"
    assert type_of(torch.empty((), dtype=torch.bool)) == "bool[]"
    assert type_of(None) == "NoneType"


def _line(name: str, op: str, text: str = "") -> Line:
    return Line(name, op, False, text or f"%{name} = {op}", "", "")


def test_diff_shows_removed_before_added_and_keeps_the_rest() -> None:
    before = [_line("a", "exp"), _line("b", "mul"), _line("c", "mean"), _line("d", "add")]
    after = [_line("a", "exp"), _line("n", "norm"), _line("d", "add", "%d = add(%n)")]
    assert diff(before, after).splitlines() == [
        "  %a = exp",
        "- %b = mul",
        "- %c = mean",
        "+ %n = norm",
        "  %d = add(%n)",
    ]
    assert diff(before, before) == "\n".join(f"  {line.text}" for line in before)
    assert diff([], after[:1]) == "+ %a = exp"
    assert diff(before[:1], []) == "- %a = exp"
