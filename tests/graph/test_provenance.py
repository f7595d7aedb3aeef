"""Layer paths and source lines, over the spellings that Dynamo and export have for a module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effopt.graph.provenance import clean_path, layer_of, source_of, template_of


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("L['self'].model.layers.0.self_attn", "model.layers.0.self_attn"),
        ("L['self'].model.layers[3].mlp", "model.layers.3.mlp"),
        ("L['self']", ""),
        ("L['fn'].1.0", "1.0"),
        ("G['model'].layers.2", "layers.2"),
        ("L['self']._modules['a']._modules['0']", "a.0"),
        ("L['fn'].__closure__[0].cell_contents.encoder.0", "encoder.0"),
        ("getattr(L['self'], '0').norm", "0.norm"),
        ("getattr(getattr(L['self'].blocks, '1'), 'w-in')", "blocks.1.w-in"),
        ("L['self'].experts['3']", "experts.3"),
        ("model.layers.0.mlp@1", "model.layers.0.mlp"),
    ],
)
def test_paths_are_those_of_named_modules(written: str, path: str) -> None:
    assert clean_path(written) == path


def test_template_takes_out_whole_numbers_only() -> None:
    assert template_of("model.layers.12.mlp2.3") == "model.layers.*.mlp2.*"
    assert template_of("0") == "*"
    assert template_of("") == ""


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.heads["a"](x)


_GLOBAL_MODEL = _Model()


@pytest.mark.parametrize("way", ["module", "closure", "global", "training"])
def test_every_call_of_a_captured_graph_has_its_layer(way: str) -> None:
    model = _GLOBAL_MODEL if way == "global" else _Model()
    names = {name for name, _ in model.named_modules()}
    seen: list[tuple[str, str]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        from effopt.graph.capture import capture

        graph = capture(module, inputs).module.graph
        seen.extend((layer_of(n), source_of(n)) for n in graph.nodes if n.op == "call_function")
        return module.forward

    function = {"closure": lambda x: model(x), "global": lambda x: _GLOBAL_MODEL(x)}.get(way, model)
    with torch.set_grad_enabled(way == "training"):
        torch.compile(function, backend=backend)(torch.randn(3, 4))
    assert {layer for layer, _ in seen} == {
        "blocks.0.inner.0",
        "blocks.0.inner.1",
        "blocks.0",
        "blocks.1.inner.0",
        "blocks.1.inner.1",
        "blocks.1",
        "heads.a",
    }
    assert {layer for layer, _ in seen} <= names
    assert any(source.endswith("in forward") and "test_provenance.py" in source for _, source in seen)
