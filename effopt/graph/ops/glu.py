"""Gated linear unit: `activation(gate) * up`.

Source: Shazeer 2020, arXiv:2002.05202, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.graph.ops.base import Sample, elementwise_flops, op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate * up)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for activation in ACTIVATIONS:
        for shape in ((1, 1), (3, 63), (2, 5, 100)):
            gate = torch.randn(shape, dtype=dtype, device=device)
            yield Sample((gate, torch.randn_like(gate), activation), {})


@op(flops=elementwise_flops(10.0), samples=_samples, fake=_fake)
def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`.

    Args:
        gate: `[..., n]`, floating.
        up: the same shape and dtype.
        activation: `silu`, `gelu` (exact), `gelu_tanh`, `relu` or `sigmoid`.

    Returns:
        `[..., n]`, dtype of `gate`.
    """
    return ACTIVATIONS[activation](gate) * up
