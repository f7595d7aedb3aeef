"""Squared ReLU by one clamp, read once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.graph.ops.base import Operands
from effopt.target import Target
from effopt_squared_relu.op import squared_relu


def clamped(x: Tensor) -> Tensor:
    """`squared_relu`, argument as there."""
    return torch.square(torch.clamp_min(x, 0))


def _supports(target: Target, operands: Operands) -> str | None:
    return None if operands["x"].is_floating_point() else "x is not floating"


def _cost(target: Target, operands: Operands, result: Any) -> float:
    return squared_relu.bytes_moved(operands, result) / target.bytes_per_s


CLAMPED = Lowering(squared_relu, "clamped", clamped, _supports, _cost)
