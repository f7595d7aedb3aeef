"""A call of linear attention as the kernels take it, and how its tokens and columns are divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.triton.rows import check_floating, multiplied_in

CHUNK, CHUNK_FLOAT32 = 32, 16
"""Tokens of a chunk; and where products are of float32, summed without matrix units, whole operands in
registers. With twice as many the backward pass spills: tests/backends/triton/test_aot.py has the bounds."""
VALUES = 32
"""Columns of a state that one program carries."""
WARPS, STAGES = 4, 1
"""Nothing is loaded ahead: the backward pass would take more shared memory than a program has."""


def chunk_for(dtype: torch.dtype, by_channel: bool) -> int:
    """Tokens of a chunk, of a call with at least that many; `by_channel`: channels decay differently."""
    # Float16 scaled by gates is multiplied in float32: with CHUNK the forward pass spills 464 bytes on sm_90.
    in_float32 = dtype == torch.float32 or (by_channel and dtype == torch.float16)
    return CHUNK_FLOAT32 if in_float32 else CHUNK


@dataclass(frozen=True)
class LinearCall:
    """One checked call of the op: rows of unit stride, decay `[b, h, t]` of any strides, or None.

    A gate for each channel is a decay `[b, h, t, d]`, of unit stride too.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    state: Tensor | None
    scale: float

    @property
    def by_channel(self) -> bool:
        """Whether channels decay differently."""
        return self.decay is not None and self.decay.dim() == 4

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        most = chunk_for(self.query.dtype, self.by_channel)
        return min(most, max(16, triton.next_power_of_2(self.query.shape[2])))

    @property
    def chunks(self) -> int:
        """Chunks of a head."""
        return triton.cdiv(self.query.shape[2], self.chunk)

    @property
    def lines(self) -> int:
        """Batch entries times heads."""
        return self.query.shape[0] * self.query.shape[1]

    @property
    def blocks(self) -> int:
        """Blocks of columns of the value."""
        return triton.cdiv(self.value.shape[-1], self.block_dv)

    @property
    def block_dv(self) -> int:
        """Columns of such a block."""
        return min(VALUES, max(16, triton.next_power_of_2(self.value.shape[-1])))

    def decay_strides(self) -> tuple[int, int, int]:
        """Elements from one decay to the next, by batch entry, head and token."""
        return (0, 0, 0) if self.decay is None else self.decay.stride()[:3]  # type: ignore[return-value]

    def options(self) -> dict[str, Any]:
        """Constants that all kernels are compiled for."""
        dot = multiplied_in(self.query)
        return {
            "SCALE": self.scale,
            "HEAD": self.query.shape[-1],
            "BLOCK_D": triton.next_power_of_2(max(16, self.query.shape[-1])),
            "BLOCK_DV": self.block_dv,
            "CHUNK": self.chunk,
            "num_warps": WARPS,
            "num_stages": STAGES,
            # Sums of many products can be beyond float16, whatever their operands are.
            "DOT": dot,
            "WIDE": tl.float32 if self.query.dtype == torch.float16 else dot,
        }

    def new_states(self) -> Tensor:
        """Room for the states before each chunk, `[b h, chunks, d, dv]`."""
        sizes = (self.lines, self.chunks, self.query.shape[-1], self.value.shape[-1])
        return self.query.new_empty(sizes, dtype=torch.float32)


def checked(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, state: Tensor | None, scale: float
) -> LinearCall:
    """A call as the kernels take it. Raises ValueError or TypeError for what they cannot run."""
    check_floating(query=query, key=key, value=value, decay=decay, state=state)
    b, h, t, d = query.shape
    if key.shape != query.shape or value.shape[:3] != query.shape[:3]:
        raise ValueError(
            f"key {list(key.shape)} and value {list(value.shape)} do not go with {list(query.shape)}"
        )
    if len({x.dtype for x in (query, key, value)}) > 1 or query.dtype == torch.float64:
        raise TypeError(f"query, key and value: expected one dtype up to float32, got {query.dtype}")
    if decay is not None:
        decay = decay.view(1, h, 1).expand(b, h, t) if tuple(decay.shape) == (h,) else decay
        if tuple(decay.shape) not in ((b, h, t), (b, h, t, d)):
            raise ValueError(f"decay: expected [h], [b, h, t] or [b, h, t, d], got {list(decay.shape)}")
        if decay.dim() == 4:
            decay = decay.squeeze(-1) if d == 1 else rows_of(decay)
    if state is not None and tuple(state.shape) != (b, h, d, value.shape[-1]):
        raise ValueError(f"state: expected [b, h, d, dv], got {list(state.shape)}")
    query, key, value = map(rows_of, (query, key, value))
    return LinearCall(query, key, value, decay, None if state is None else state.contiguous(), scale)


def rows_of(x: Tensor) -> Tensor:
    """`x`, or a copy of it if its rows have gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()
