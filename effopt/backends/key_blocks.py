"""Which keys a block of queries reaches, found at run time from bands, ids and masks of an attention.

The keys of a block go from the first to the last that any of its rows sees: by the band, by the ids (keys
whose id lies between the least and the greatest of the block's: no order is assumed), and by a mask over
keys. Anchors, which neither band nor ids mask, come before them. Nothing about the values is taken on trust.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effopt.graph.ops.attention import open_keys

_LEAST, _MOST = 64, 256
"""Queries in a block. Below, calls cost more than the edges of bands that they save; above, less."""
_TILE = 32
"""Queries that PyTorch's kernel gives to one thread, in blocks of this size."""


@dataclass(frozen=True)
class Call:
    """One call of the op: tensors as they are given, or with gradients of their own."""

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
    low: int
    high: int
    anchors: int
    prefix: int
    zero_masked_rows: bool
    rows_see_key: bool
    bands: dict[tuple[int, ...], tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    """Masks of blocks that differ in nothing but their place: queries, keys, and bounds counted from them."""

    @property
    def gives_mean(self) -> bool:
        """Whether a row without keys gets the mean of all values."""
        return math.isfinite(self.fill) and not self.rows_see_key and self.sinks is None


@dataclass(frozen=True)
class Block:
    """Some batch entries, some queries, and the keys that they reach."""

    batch: slice
    queries: slice
    keys: slice
    anchors: int = 0
    """How many of the first keys are read before `keys`, which begin later."""

    @property
    def is_empty(self) -> bool:
        """Whether no query of the block sees a key."""
        return self.keys.start >= self.keys.stop

    @property
    def segments(self) -> list[tuple[slice, slice]]:
        """Columns of the block, and the keys that they are."""
        end = self.anchors + self.keys.stop - self.keys.start
        keys = (slice(self.anchors, end), self.keys)
        return [keys] if not self.anchors else [(slice(0, self.anchors),) * 2, keys]

    def read(self, x: Tensor, dim: int) -> Tensor:
        """The keys of the block along one dimension of `x`."""
        parts = [x.narrow(dim, k.start, k.stop - k.start) for _, k in self.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def entries_of(call: Call) -> list[slice]:
    """Batch entries, those apart that something else is told of each."""
    b = call.query.shape[0]
    apart = any(x is not None and x.dim() == n and x.shape[0] > 1 for x, n in _per_entry(call))
    return [slice(i, i + 1) for i in range(b)] if apart else [slice(0, b)]


def blocks_of(call: Call, batch: slice, rows: slice) -> Iterator[Block]:
    """Blocks of some batch entries and rows: every row is in one."""
    b, t, s = call.query.shape[0], call.query.shape[-2], call.key.shape[-2]
    size = block_size(t, call.low, call.high, b * call.query.shape[1])
    for start in range(rows.start, rows.stop, size):
        queries = slice(start, min(rows.stop, start + size))
        first, last = max(0, start + call.low), min(s, max(queries.stop + call.high, call.prefix))
        anchors = max(0, min(call.anchors, last))
        first = max(first, anchors)
        keys = _narrowed(call, batch, queries, first, max(first, last))
        if anchors and keys.start in (anchors, keys.stop):
            anchors, keys = 0, slice(0, max(anchors, keys.stop if keys.start < keys.stop else 0))
        yield Block(batch, queries, keys, anchors)


def _per_entry(call: Call) -> list[tuple[Tensor | None, int]]:
    return [(call.mask, 4), (call.query_ids, 2), (call.key_ids, 2)]


def block_size(t: int, low: int, high: int, lanes: int) -> int:
    """Queries in a block: an eighth of what a row sees, and enough for all threads over `lanes` heads."""
    width = min(t, high - low + 1)
    tiles = 2 * torch.get_num_threads() // max(lanes, 1)
    return min(_MOST, max(_LEAST, 1 << (width // 16).bit_length(), _TILE * tiles))


def _narrowed(call: Call, batch: slice, queries: slice, first: int, last: int) -> slice:
    """From the first to the last key that ids and a mask over keys leave open."""
    seen: Tensor | None = None
    if first >= last:
        return slice(first, first)
    if call.query_ids is not None and call.key_ids is not None:
        rows, keys = _ids(call.query_ids, batch, queries), _ids(call.key_ids, batch, slice(first, last))
        seen = ((keys >= rows.min()) & (keys <= rows.max())).any(0)
    mask = call.mask
    if mask is not None and is_over_keys(mask):
        open_ = part(mask, batch, queries, slice(first, last)).reshape(-1, last - first).any(0)
        seen = open_ if seen is None else seen & open_
    if seen is None:
        return slice(first, last)
    (at,) = seen.nonzero(as_tuple=True)
    return slice(first + int(at[0]), first + int(at[-1]) + 1) if len(at) else slice(first, first)


def is_over_keys(mask: Tensor) -> bool:
    """Whether a mask is the same for all queries and differs between keys."""
    return mask.dim() > 0 and mask.shape[-1] > 1 and (mask.dim() == 1 or mask.shape[-2] == 1)


def _ids(ids: Tensor, batch: slice, places: slice) -> Tensor:
    """`[entries, n]`."""
    return ids[places].unsqueeze(0) if ids.dim() == 1 else _entries(ids, batch)[:, places]


def _entries(x: Tensor, batch: slice) -> Tensor:
    return x if x.shape[0] == 1 else x[batch]


def part(x: Tensor, batch: slice, queries: slice, keys: slice) -> Tensor:
    """What a block reads of a tensor that broadcasts to `[b, h, t, s]`."""
    x = _entries(x, batch) if x.dim() == 4 else x
    x = x if x.dim() < 2 or x.shape[-2] == 1 else x[..., queries, :]
    return x if not x.dim() or x.shape[-1] == 1 else x[..., keys]


def part_in(x: Tensor, block: Block) -> Tensor:
    """The same for one block, its anchors included."""
    parts = [part(x, block.batch, block.queries, keys) for _, keys in block.segments]
    alike = len(parts) == 1 or not x.dim() or x.shape[-1] == 1
    return parts[0] if alike else torch.cat(parts, -1)


def open_in(call: Call, block: Block) -> Tensor | None:
    """Which keys of a block its queries see, 2 or 4 dimensions; None if all do."""
    band, rest = _band(call, block)[0], _besides_band(call, block)
    seen = rest if band is None else band if rest is None else band & rest
    return seen.unsqueeze(0) if seen is not None and seen.dim() == 3 else seen


def allowed_in(call: Call, block: Block) -> Tensor | None:
    """The same for a kernel: a band alone as numbers to add, which it would else make of it each time."""
    return _band(call, block)[1] if _besides_band(call, block) is None else open_in(call, block)


def _band(call: Call, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """The band of a block as truth values, and as 0 and -inf; None if it leaves all open."""
    t, start = block.queries.stop - block.queries.start, block.queries.start
    bounds = [_bounds(call, keys, start, t) for _, keys in block.segments]
    key = (t, *(number for segment in bounds for number in segment))
    if key not in call.bands:
        parts = [_band_part(t, *segment, call.query.device) for segment in bounds]
        seen = None if all(x is None for x in parts) else _joined(parts, t, [b[0] for b in bounds])
        added = None if seen is None else torch.zeros_like(seen, dtype=call.query.dtype)
        added = None if added is None or seen is None else added.masked_fill(~seen, -math.inf)
        call.bands[key] = seen, added
    return call.bands[key]


def _bounds(call: Call, keys: slice, start: int, t: int) -> tuple[int, int, int, int, int]:
    """Number of keys, low, high, anchors and prefix of a run of keys, counted from it."""
    s, shift = keys.stop - keys.start, keys.start - start
    low, high = max(call.low - shift, 1 - t), min(call.high - shift, s - 1)
    return s, low, high, *(max(0, min(n - keys.start, s)) for n in (call.anchors, call.prefix))


def _band_part(
    t: int, s: int, low: int, high: int, anchors: int, prefix: int, device: torch.device
) -> Tensor | None:
    below = low if low > 1 - t and anchors < s else None
    above = high if high < s - 1 and prefix < s else None
    return open_keys(t, s, device, below, above, anchors=anchors, prefix=prefix)


def _joined(parts: list[Tensor | None], t: int, sizes: list[int]) -> Tensor:
    device = next(x.device for x in parts if x is not None)
    all_open = (torch.ones(t, s, dtype=torch.bool, device=device) for s in sizes)
    return torch.cat([x if x is not None else o for x, o in zip(parts, all_open, strict=True)], -1)


def _besides_band(call: Call, block: Block) -> Tensor | None:
    seen: Tensor | None = None
    if call.query_ids is not None and call.key_ids is not None:
        rows = _ids(call.query_ids, block.batch, block.queries)
        keys = block.read(_ids(call.key_ids, block.batch, slice(None)), 1)
        if bool((rows != rows[0, 0]).any()) or bool((keys != rows[0, 0]).any()):
            t, s = rows.shape[-1], keys.shape[-1]
            anchors = block.anchors or max(0, call.anchors - block.keys.start)
            seen = open_keys(t, s, rows.device, query_ids=rows, key_ids=keys, anchors=anchors)
    if call.mask is not None:
        mask = part_in(call.mask, block)
        mask = mask.expand(*(1,) * (2 - mask.dim()), *mask.shape) if mask.dim() < 2 else mask
        seen = mask if seen is None else seen & mask
    return seen
