"""What looks like a stack of layers and is none, or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graph.analyses.layer_cases import analysed, only

WIDTH = 16


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Attention(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(self.up(h).softmax(-1))


class Model(nn.Module):
    """`blocks`, run by `how`."""

    def __init__(self, how: Callable[[nn.ModuleList, Tensor], Any], *blocks: nn.Module) -> None:
        super().__init__()
        self.how, self.blocks = how, nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Any:
        return self.how(self.blocks, x)


def unet(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    a = blocks[0](x)
    b = blocks[1](a)
    c = blocks[2](b)
    return blocks[3](c + b) + a


def ladder(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    given = []
    for block in blocks:
        x = block(x)
        given.append(x)
    return torch.cat(given, -1)


def dense(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = torch.cat([x, block(x[..., :WIDTH])], -1)
    return x


def towers(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return sum(block(x) for block in blocks)


def delayed(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """Each block's addition reaches the stream one block later: two values are passed on."""
    pending = torch.zeros_like(x)
    for block in blocks:
        y = block(x) - x
        x, pending = x + pending, y.tanh()
    return x + pending


def gated(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        gate = torch.sigmoid(block.down(block.up(x)))
        x = gate * block.norm(x) + (1 - gate) * x
    return x


def without_residual(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block.down(block.up(x).relu())
    return x


def four() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(4)]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model(unet, *four()), "what blocks.1 gives is read by blocks.2 and add"),
        (Model(ladder, *four()), "what blocks.0 gives is read again behind the last layer"),
        (Model(dense, *four()), ""),
        (Model(towers, *four()), ""),
        (Model(towers, *four()[:2]), ""),
        (Model(delayed, *four()), ""),
        (Model(gated, *four()), ""),
        (Model(without_residual, *four()), ""),
        (nn.Sequential(Block(16), nn.Linear(16, 32), Block(32), nn.Linear(32, 8), Block(8)), ""),
        (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), ""),
    ],
    ids=[
        "unet",
        "ladder",
        "dense",
        "towers",
        "two towers",
        "delayed",
        "gated",
        "no residual",
        "widths",
        "two linears",
    ],
)
def test_look_alikes_are_no_stack(model: nn.Module, reason: str) -> None:
    with torch.no_grad():
        (seen,) = analysed(model, torch.randn(2, 5, WIDTH))
    assert seen.paths == []
    if reason:
        assert any(reason in told for _, told in seen.found.refused), seen.found.refused


class Layered(nn.Module):
    """One layer whose parts are in a list, as T5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Attention(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[1](self.parts[0](x))


def test_parts_of_a_layer_are_not_layers() -> None:
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        (alone,) = analysed(nn.Sequential(Layered()), x)
        assert alone.paths == []
        assert only(analysed(nn.Sequential(*(Layered() for _ in range(3))), x)).paths == [["0", "1", "2"]]


def test_layers_apart_are_two_stacks() -> None:
    """What lies between is no layer, so what one gives is not what the next one reads."""

    def how(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        return blocks[3](blocks[2](torch.tanh(blocks[1](blocks[0](x)))))

    with torch.no_grad():
        seen = only(analysed(Model(how, *four()), torch.randn(2, 5, WIDTH)))
    assert seen.paths == [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]


def test_a_shared_module_is_as_many_layers_as_calls() -> None:
    def how(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for _ in range(3):
            x = blocks[0](x)
        return x

    with torch.no_grad():
        seen = only(analysed(Model(how, Block()), torch.randn(2, 5, WIDTH)))
    assert seen.paths == [["layer 0", "layer 1", "layer 2"]]
