"""Squared ReLU: `relu(x)^2`.

Source: So et al. 2021, arXiv:2109.08668.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from effopt.graph.ops.base import Sample, elementwise_flops, op


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for shape in ((1,), (3, 63), (2, 5, 100)):
        yield Sample((torch.randn(shape, dtype=dtype, device=device),), {})


@op(flops=elementwise_flops(2.0), samples=_samples)
def squared_relu(x: Tensor) -> Tensor:
    """`relu(x)^2`, any shape, dtype of `x`."""
    return torch.relu(x) * torch.relu(x)
