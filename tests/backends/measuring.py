"""An op to ask about, and lowerings of known cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.backends.base import Lowering
from effopt.backends.measured import Measurer
from effopt.backends.native import LOWERINGS as NATIVE
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.target import target_of

CPU = target_of(torch.device("cpu"))
SDPA, REFERENCE = NATIVE[0], reference_lowering(ops.attention)
OPERANDS = ops.attention.bind(tuple(torch.zeros(1, 2, 8, 4) for _ in range(3)), {"scale": 0.5})


def costing(name: str, seconds: float) -> Lowering:
    return Lowering(ops.attention, name, SDPA.call, lambda t, o: None, lambda t, o, r: seconds)


def ask(lowerings: Sequence[Lowering], measurer: Measurer | None = None, **changed: Any) -> Any:
    bound = {**OPERANDS, **changed}
    return (measurer or Measurer()).of(bound, bound["query"])(lowerings)


class Attention(torch.nn.Module):
    """Plain, so that the library kernel and the reference compete."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.line(x).view(1, -1, 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).sum(1)
