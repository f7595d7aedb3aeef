"""Loops over time as graphs, and the recurrences found in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from effopt.graph.analyses.recurrences import Found, recurrences
from effopt.graph.capture import capture

Loop = Callable[..., Any]


def graph_of(loop: Loop, *inputs: Tensor) -> Graph:
    """The normal form of an unrolled loop."""
    graphs = []

    def backend(module: Any, given: Any) -> Any:
        graphs.append(capture(module, given).module.graph)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(loop, backend=backend)(*inputs)
    (graph,) = graphs
    return graph


def found_in(loop: Loop, steps: int = 4) -> Found:
    """What is found for a decay and an input of `[2, steps, 3, 4]`, and a read-out of `[2, steps, 4]`."""
    inputs = [torch.rand(2, steps, 3, 4), torch.randn(2, steps, 3, 4), torch.randn(2, steps, 4)]
    return recurrences(graph_of(loop, *inputs))


def read(h: Tensor, c: Tensor, i: int) -> Tensor:
    return (h * c[:, i][:, None]).sum(-1)


def plain(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in range(a.shape[1]):
        h = a[:, i] * h + u[:, i]
        ys.append(read(h, c, i))
    return torch.stack(ys, 1)
