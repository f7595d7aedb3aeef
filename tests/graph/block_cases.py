"""Stacks of equal layers, captured in blocks and whole."""

from __future__ import annotations

from collections.abc import Callable
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
