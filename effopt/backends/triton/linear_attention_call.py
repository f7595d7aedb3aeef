"""A call of linear attention as the kernels take it, and how its tokens and columns are divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.triton.rows import check_floating, multiplied_in

CHUNK, CHANNEL_CHUNK, CHUNK_FLOAT32 = 64, 32, 16
"""Tokens of a chunk; where channels decay differently; and where products, or those with states, are of
float32, summed without matrix units, whole operands in registers. 64 are what the matrix units of sm_90 take
at once; with fewer, states of chunks are most of the bytes. Twice as many spill:
tests/backends/triton/test_aot.py has the bounds."""
STATE_VALUES, CHUNK_VALUES = 32, 64
"""Columns of the value that a program takes: few where it walks over all tokens, so that there are many
programs; more where it takes one chunk, whose scores it computes for each block of them."""
FLOAT32_VALUES, LONG_FLOAT32_VALUES = 32, 16
"""And at most this many where products are summed without matrix units. Fewer with heads above 64: with 32
programs of one chunk spill 64 to 112 bytes a thread on sm_80, sm_90 and sm_100 (Triton 3.9), and walks over
float32 spill 24."""
WARPS, STAGES, STATE_STAGES = 4, 1, 3
"""Keys and values of the next chunks are loaded ahead in the walk over tokens; elsewhere there is no loop, or
no room in shared memory."""


def chunk_for(dtype: torch.dtype, by_channel: bool) -> int:
    """Tokens of a chunk, of a call with at least that many; `by_channel`: channels decay differently."""
    if width(dtype) == torch.float32:
        return CHUNK_FLOAT32
    return CHANNEL_CHUNK if by_channel else CHUNK


def width(dtype: torch.dtype) -> torch.dtype:
    """What products with states are taken in, and states between chunks kept in.

    Sums of many products can be beyond float16, whatever its operands are.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def columns_for(most: int, dtype: torch.dtype, dv: int) -> int:
    """Columns of the value that one program takes, of `most` at least that are there."""
    most = most if width(dtype) == torch.bfloat16 else min(most, FLOAT32_VALUES)
    return min(most, max(16, triton.next_power_of_2(dv)))


def chunk_columns_for(dtype: torch.dtype, d: int, dv: int) -> int:
    """Columns of the value in a program of one chunk, of heads of `d`."""
    most = CHUNK_VALUES if width(dtype) == torch.bfloat16 or d <= 64 else LONG_FLOAT32_VALUES
    return columns_for(most, dtype, dv)


def walk_columns_for(dtype: torch.dtype, d: int, dv: int) -> int:
    """And of a program that walks over all tokens."""
    most = LONG_FLOAT32_VALUES if dtype == torch.float32 and d > 64 else STATE_VALUES
    return columns_for(most, dtype, dv)


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
    def chunk_columns(self) -> int:
        """Columns of the value that a program of one chunk takes."""
        return chunk_columns_for(self.query.dtype, self.query.shape[-1], self.value.shape[-1])

    @property
    def walk_columns(self) -> int:
        """And one that walks over all tokens."""
        return walk_columns_for(self.query.dtype, self.query.shape[-1], self.value.shape[-1])

    def programs(self, columns: int) -> int:
        """Blocks of so many columns, of all heads."""
        return self.lines * triton.cdiv(self.value.shape[-1], columns)

    def decay_strides(self) -> tuple[int, int, int]:
        """Elements from one decay to the next, by batch entry, head and token."""
        return (0, 0, 0) if self.decay is None else self.decay.stride()[:3]  # type: ignore[return-value]

    def options(self, columns: int) -> dict[str, Any]:
        """Constants that all kernels are compiled for."""
        dot = multiplied_in(self.query)
        return {
            "SCALE": self.scale,
            "HEAD": self.query.shape[-1],
            "BLOCK_D": triton.next_power_of_2(max(16, self.query.shape[-1])),
            "BLOCK_DV": columns,
            "CHUNK": self.chunk,
            "num_warps": WARPS,
            "num_stages": STAGES,
            "DOT": dot,
            "WIDE": dot if width(self.query.dtype) == self.query.dtype else tl.float32,
        }

    def new_states(self) -> Tensor:
        """Room for the states before each chunk, `[b h, chunks, d, dv]`, as products will read them."""
        sizes = (self.lines, self.chunks, self.query.shape[-1], self.value.shape[-1])
        return self.query.new_empty(sizes, dtype=width(self.query.dtype))


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
    state = None if state is None else state.contiguous()
    return LinearCall(query, key, value, decay, state, scale)


def rows_of(x: Tensor) -> Tensor:
    """`x`, or a copy of it if its rows have gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()
