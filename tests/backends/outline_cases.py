"""Models of equal layers, what a report says was outlined, and how gradients are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual layer whose input, and a view of it, are both kept for the backward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * x.sigmoid()


class Stack(nn.Module):
    def __init__(self, depth: int, width: int = 32, keep: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last, self.keep = nn.LayerNorm(width), keep

    def forward(self, x: Tensor) -> Any:
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x.transpose(0, 1))
        return (self.last(x), *seen) if self.keep else self.last(x)


def outlined_counts(report: Any) -> list[int]:
    return [block.count for graph in report.graphs for block in graph.outlined if not block.left]


def assert_gradients_close(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Each to within a ten-thousandth of its largest value."""
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())
