"""Operands as a model might have them, where only their sizes, dtypes and strides are known.

Numbers, masks of requests of different lengths, ids of two documents in a row, codes of a quantised weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effopt.graph.ops.base import Op, hint
from effopt.graph.sampling import with_strides


def made_up_call(op: Op, operands: Mapping[str, Any]) -> dict[str, Any]:
    """Operands by name as a model might have them, and as the op says where it does."""
    made = {name: made_up(value) for name, value in operands.items()}
    return made if op.contents is None else dict(op.contents(made))


def made_up(value: Any) -> Any:
    """A value as a model might have it, of the same size, dtype and strides; symbols at their hints."""
    if isinstance(value, torch.SymInt):
        return hint(value)
    if not isinstance(value, Tensor):
        return value
    sizes, strides = [hint(n) for n in value.shape], [hint(n) for n in value.stride()]
    compact = [1 if stride == 0 else n for n, stride in zip(sizes, strides, strict=True)]
    drawn = _drawn(compact, value.dtype, torch.Generator().manual_seed(0))
    return with_strides(drawn.to(value.device), sizes, strides)


def _drawn(sizes: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    last = sizes[-1] if sizes else 1
    along = torch.arange(last)
    if dtype == torch.bool:
        # Requests of different lengths: row i of the batch is open for its first (i + 1) / b.
        rows = torch.arange(1, (sizes[0] if len(sizes) > 1 else 1) + 1)
        lengths = (last * rows + len(rows) - 1) // len(rows)
        seen = along < lengths.view(-1, *(1,) * (len(sizes) - 1)) if len(sizes) > 1 else along < last
        return seen.expand(sizes).clone() if sizes else torch.tensor(True)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(sizes, generator=generator, dtype=wide).to(dtype)
    if dtype in (torch.uint8, torch.int8):
        return torch.randint(0, 128, sizes, generator=generator, dtype=dtype)  # codes of a quantised weight
    return (
        (2 * along // max(1, last)).expand(sizes).to(dtype).clone() if sizes else torch.zeros((), dtype=dtype)
    )
