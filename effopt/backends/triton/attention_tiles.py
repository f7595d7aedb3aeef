"""What the attention kernels share: a call and what it is compiled for, how tiles are cut, what they cost.

Rows of a tile are queries and the heads of a group together, the heads of one query next to each other: so a
tile reads each key once for all heads that share it, few queries still fill matrix units, and the queries of
a tile are neighbours, which keeps its range of keys as narrow as a band allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from effopt.backends.triton.rows import LAUNCH_S, multiplied_in
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint, tensor_bytes
from effopt.target import Target, reads_shared_memory

PROGRAMS = 256
"""Programs that fill a GPU: about two for each multiprocessor of an sm_90. A constant, not of the device, so
that keys are divided, and sums taken, in the same order everywhere."""
CACHED_BYTES = 2**25
"""What several programs read is taken to stay in the L2 cache up to this: sm_80 has 40 MiB, sm_90 50."""
UNREACHED = -1e9
"""No score comes near a fill at or below this: beside a key that is seen, a masked one has weight 0."""
LEAST_FLOAT32 = float(torch.finfo(torch.float32).min)
LOG2_E = math.log2(math.e)
UNMEASURED = 1.5
"""How much slower than the roofline a kernel is taken to be while no GPU has measured it."""


@dataclass(frozen=True)
class AttentionTile:
    """Rows and keys of a step; warps, and how many steps' keys are loaded ahead."""

    rows: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Launch options."""
        steps = {"num_warps": self.warps, "num_stages": self.stages}
        return {"ROWS": self.rows, "KEYS": self.keys, **steps}


def tile_for(rows: int, head: int, dtype: torch.dtype, dense: bool, shared: bool = False) -> AttentionTile:
    """The tile of a call of `rows` rows a KV head, `head` the longer of the head sizes of keys and values.

    Sixteen rows are the least that matrix units take. What limits the rest is registers: a thread holds its
    part of the sums, of the scores and of their weights, and the addresses of all that it loads, those of a
    bias or mask `[t, s]` if the call is `dense`, or what tells anchors from ids. At most 40 bytes a thread
    are spilled, and a program takes at most 96 KiB of shared memory, 64 on gfx942:
    tests/backends/triton/test_aot.py has these bounds.

    `shared`: matrix units take operands out of shared memory (sm_90 and newer), which frees registers. For
    each 16 numbers of a head they read 64 rows and n keys in 16 + n / 4 cycles, at 128 bytes a cycle, and
    multiply them in n / 2, at 2,048 products: fewer than 64 keys wait for memory.
    """
    wide = triton.next_power_of_2(max(16, head))
    fits = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    if dtype == torch.float32:
        # Summed without matrix units, whole operands in registers.
        return AttentionTile(min(fits, 32 if wide <= 128 else 16), 16 if dense or wide > 128 else 32, 8, 1)
    if wide > 128:
        return AttentionTile(min(fits, 32 if dense else 64), 16 if dense else 32, 8, 1)
    fits = min(fits, 64) if dense else fits
    warps = 8 if fits == 128 or (dense and fits > 16) else 4
    roomy = shared and fits >= 64 and not dense
    narrow = dense or (wide == 128 and fits > 16 and not roomy)
    # Registers let one program of 128 rows onto a multiprocessor: nothing else hides how long loads take. Of
    # few rows they let three, at 138 a thread on sm_90, and the keys of two more steps of each fit, 210 KiB.
    ahead = (roomy and fits == 128) or (shared and fits == 16 and not dense and wide <= 128)
    return AttentionTile(fits, 32 if narrow else 64, warps, 3 if ahead else 2)


@dataclass(frozen=True)
class AttentionCall:
    """One call on real tensors: query, key and value of 4 dimensions, the others as given."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    sinks: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    scale: float
    fill: float
    softcap: float
    low: int | None
    high: int | None
    is_causal: bool
    zero_masked_rows: bool
    rows_see_key: bool
    anchors: int | None
    prefix: int | None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """b, hkv, heads of a group, t, s."""
        b, h, t, _ = self.query.shape
        return b, self.key.shape[1], h // max(1, self.key.shape[1]), t, self.key.shape[2]

    @property
    def tile(self) -> AttentionTile:
        _, _, group, t, _ = self.sizes
        over_keys = self.mask is None or is_over_keys(self.mask, t)
        dense = self.bias is not None or not over_keys or (self.anchored > 0 and self.key_ids is not None)
        head, shared = max(self.query.shape[-1], self.value.shape[-1]), reads_shared_memory(self.query.device)
        return tile_for(t * group, head, self.query.dtype, dense, shared)

    @property
    def row_tiles(self) -> int:
        """Tiles that cover the rows of all KV heads."""
        b, hkv, group, t, _ = self.sizes
        return b * hkv * triton.cdiv(t * group, self.tile.rows)

    def lines_in_turn(self, read: int) -> int:
        """KV heads whose tiles take turns, the longest of all first, where tiles differ in what they see.

        One head after the other, all wait for the long tiles of the last one. With 16 heads of 4,096 causal
        queries, in tiles of 128 on 132 multiprocessors, that is a quarter of the time, and in turn 6 %. (That
        is counted, not measured.) Each program reads up to `read` tokens of two operands, which the heads
        that take turns should find in the cache.
        """
        b, hkv, _, _, s = self.sizes
        low, high = self.band
        if 2 * (high - low) < s or (high >= s - 1 and not self.is_causal):
            return 1
        read_bytes = read * (self.query.shape[-1] + self.value.shape[-1]) * self.query.element_size()
        return max(1, min(b * hkv, CACHED_BYTES // max(1, read_bytes)))

    @property
    def band(self) -> tuple[int, int]:
        """(low, high) within the differences that occur; with causality where masked keys have no weight."""
        _, _, _, t, s = self.sizes
        low = -t if self.low is None else min(max(self.low, -t), s)
        high = s if self.high is None else max(min(self.high, s), -t)
        return low, min(high, 0) if self._causal_by_band else high

    @property
    def _causal_by_band(self) -> bool:
        """Whether causality is a bound of the band: a key that it masks is masked for certain."""
        return self.is_causal and self.hides and not self.ahead

    @property
    def anchored(self) -> int:
        """Keys that neither a lower bound nor ids mask; 0 if there is no such bound."""
        unbound = self.anchors is None or (self.low is None and self.key_ids is None)
        return 0 if unbound else max(0, min(self.anchors or 0, self.key.shape[2]))

    @property
    def ahead(self) -> int:
        """Keys that the upper bound does not mask; 0 if there is none, or causality is as strict."""
        unbound = self.high is None or self.prefix is None or (self.is_causal and self.high >= 0)
        return 0 if unbound else max(0, min(self.prefix or 0, self.key.shape[2]))

    @property
    def hides(self) -> bool:
        """Whether masked keys have weight 0 in every row, so that they need not be read."""
        if self.fill == -math.inf:
            return True
        if self.fill > UNREACHED or self.bias is not None or self.sinks is not None:
            return False
        return self.rows_see_key or self._band_leaves_keys()

    def _band_leaves_keys(self) -> bool:
        """Whether nothing but a band masks keys, and it leaves every row one."""
        _, _, _, t, s = self.sizes
        low = -t if self.low is None else self.low
        high = s if self.high is None else self.high
        high = min(high, 0) if self.is_causal else high
        alone = self.mask is None and self.query_ids is None
        return alone and low <= high and high >= 0 and t - 1 + low <= s - 1

    def tensors(self) -> tuple[Any, ...]:
        """The kernel's operands, up to those that it writes."""
        mask = None if self.mask is None else self.mask.view(torch.uint8)
        ids = (None if x is None else x.contiguous() for x in (self.query_ids, self.key_ids))
        return (self.query, self.key, self.value, self.bias, mask, self.sinks, *ids)

    def numbers(self) -> tuple[Any, ...]:
        """Strides, sizes, band and first keys, in the kernel's order."""
        sink = 0 if self.sinks is None else self.sinks.stride(0)
        return (*self.strides(), sink, *self.extent())

    def extent(self) -> tuple[int, ...]:
        """KV heads, heads of a group, t, s, low, high, and the first keys that those do not mask."""
        return (*self.sizes[1:], *self.band, self.anchored, self.ahead)

    def strides(self) -> tuple[Any, ...]:
        """Of query, key, value, bias and mask; and of ids from one entry of the batch to the next."""
        b, hkv, group, t, s = self.sizes
        full = (b, hkv * group, t, s)
        strides = [x.stride() for x in (self.query, self.key, self.value)]
        strides += [(0, 0, 0, 0) if x is None else x.expand(full).stride() for x in (self.bias, self.mask)]
        ids = ((self.query_ids, t), (self.key_ids, s))
        by_batch = (n if x is not None and x.dim() == 2 and x.shape[0] > 1 else 0 for x, n in ids)
        return (*strides, *by_batch)

    def options(self) -> dict[str, Any]:
        """Constants that the kernel is compiled for."""
        d, dv = self.query.shape[-1], self.value.shape[-1]
        # A bias or a sink may be the least of float32, which times log2(e) would be -inf.
        base2 = self.bias is None and self.sinks is None
        unit = LOG2_E if base2 else 1.0
        fill = -math.inf if self.hides else self.fill
        return {
            "SCALE": self.scale if self.softcap else self.scale * unit,
            "SOFTCAP": abs(self.softcap),
            "UNIT": unit,
            "FILL": min(max(fill * unit, LEAST_FLOAT32), -LEAST_FLOAT32)
            if fill >= LEAST_FLOAT32
            else -math.inf,
            "HIDES": self.hides,
            "CAUSAL": self.is_causal and not self._causal_by_band,
            "MASK_OVER_KEYS": is_over_keys(self.mask, self.query.shape[2]),
            "ANCHORS": self.anchored > 0,
            "PREFIX": self.ahead > 0,
            "HEAD": d,
            "VALUE_HEAD": dv,
            "BLOCK_D": triton.next_power_of_2(max(16, d)),
            "BLOCK_DV": triton.next_power_of_2(max(16, dv)),
            "DOT": multiplied_in(self.query),
            **self.tile.options(),
        }


def is_over_keys(mask: Tensor | None, t: int) -> bool:
    """Whether a mask is one row for all queries and heads, such as that of padding."""
    return mask is not None and mask.shape[1] == 1 and (mask.shape[2] == 1 or t == 1)


def attention_cost(programs: Callable[[Operands], float], launches: int) -> Any:
    """The cost of a kernel that runs so many programs, and reads what a band leaves open once.

    No GPU has measured these kernels yet, so they are taken to be slower than the roofline, which is what the
    library's kernel is predicted at: it is preferred wherever it makes no mask of its own.
    """

    def cost(target: Target, operands: Operands, result: Any) -> float:
        unread = (1.0 - share_of_keys(operands)) * tensor_bytes([operands["key"], operands["value"]])
        moved = (ops.attention.bytes_moved(operands, result) - unread) / target.bytes_per_s
        work = ops.attention.flops(operands, result) / target.flops_per_s
        busy = min(1.0, max(1.0, programs(operands)) / PROGRAMS)
        return UNMEASURED * max(moved, work) / busy + launches * LAUNCH_S

    return cost


def share_of_keys(operands: Operands) -> float:
    """Share of the keys that some row sees by the band, `is_causal` included, at the hints of sizes."""
    t, s = hint(operands["query"].shape[-2]), hint(operands["key"].shape[-2])
    low = -t if operands["low"] is None else hint(operands["low"])
    high = s if operands["high"] is None else hint(operands["high"])
    high = min(high, 0) if operands["is_causal"] else high
    anchors, ahead = (0 if operands[name] is None else hint(operands[name]) for name in ("anchors", "prefix"))
    last, first = min(s, max(t + high, 0 if operands["is_causal"] else ahead)), max(0, low)
    return (max(0, last - first) + max(0, min(anchors, first, last))) / max(1, s)


def row_tiles(operands: Operands) -> float:
    """Programs of a call whose keys are not divided, at the hints of symbolic sizes."""
    query, key, mask = operands["query"], operands["key"], operands["mask"]
    group = hint(query.shape[1]) // max(1, hint(key.shape[1])) if query.dim() == 4 else 1
    rows = hint(query.shape[-2]) * group
    dense = operands["bias"] is not None or (mask is not None and mask.dim() > 1 and hint(mask.shape[-2]) > 1)
    head = max(hint(query.shape[-1]), hint(operands["value"].shape[-1]))
    tile = tile_for(rows, head, query.dtype, dense)
    return float(math.prod(map(hint, key.shape[:-2])) * triton.cdiv(rows, tile.rows))
