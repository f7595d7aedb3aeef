"""`x @ weight^T + bias`: ATen's composite op is the one spelling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from effopt.graph.ops.base import Operands, Sample, adopt, hint


def _flops(operands: Operands, result: Any) -> float:
    return 2.0 * hint(result.numel()) * hint(operands["input"].shape[-1])


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for rows, k, n in ((1, 1, 1), (7, 63, 100), (2, 64, 32)):
        x = torch.randn(rows, k, dtype=dtype, device=device)
        weight = torch.randn(n, k, dtype=dtype, device=device)
        yield Sample((x, weight), {})
        yield Sample((x, weight, torch.randn(n, dtype=dtype, device=device)), {})


linear = adopt(torch.ops.aten.linear.default, name="linear", flops=_flops, samples=_samples)
