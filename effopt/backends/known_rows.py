"""Rows of an attention whose keys PyTorch's CPU kernel computes without a mask over all of them.

They see all keys of a range, those up to their own, or a band that moves by one key a row. Rows that see two
such ranges, a past and what is causal behind it, or anchors and a band, join them by log-sum-exp.

Source: Dao et al. 2022, arXiv:2205.14135, section 3.1 (parts of a softmax are joined by their sums).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from effopt.backends.attention_parts import DTYPES, flash, flash_backward
from effopt.backends.band_steps import STEP, band, band_backward
from effopt.backends.key_blocks import Call, entries_of, is_over_keys, part

_FEW = 16
"""Fewer rows than these are not worth a call of their own."""


class Kind(Enum):
    """Which keys of a range a row sees."""

    ALL = "all"
    CAUSAL = "up to its own; there are as many as rows"
    BAND = "as many as any other row, each row one key further on"


@dataclass(frozen=True)
class Rows:
    """Some queries of some batch entries, and the ranges of keys that they see: one, or two to be joined."""

    batch: slice
    queries: slice
    ranges: tuple[tuple[Kind, slice], ...] = ()
    """None where a mask is needed to tell."""

    @property
    def pairs(self) -> int:
        """Pairs of query and key of one batch entry and head that are computed, where no mask is needed."""
        rows = _length(self.queries)
        return sum(_pairs(kind, rows, _length(keys)) for kind, keys in self.ranges)


def rows_of(call: Call) -> Iterator[Rows]:
    """All rows of a call, each once."""
    for batch in entries_of(call):
        for queries, keys in _documents(call, batch):
            if keys is None:
                yield Rows(batch, queries)
            else:
                yield from _in_range(call, batch, queries, keys)


def attend(call: Call, rows: Rows) -> tuple[Tensor, Tensor]:
    """Their results `[entries, h, rows, dv]`, and the log-sum-exp of their scores."""
    q = call.query[rows.batch, :, rows.queries]
    found = []
    for kind, keys in rows.ranges:
        k, v = call.key[rows.batch, :, keys], call.value[rows.batch, :, keys]
        if kind is Kind.BAND:
            found.append(band(q, k, v, call.scale))
        else:
            found.append(flash(q, k, v, 0.0, kind is Kind.CAUSAL, scale=call.scale))
    out, lse = found[0]
    for other, its in found[1:]:
        share = torch.sigmoid(its - lse).unsqueeze(-1)
        out = torch.lerp(out.to(share.dtype), other.to(share.dtype), share).to(out.dtype)
        lse = torch.logaddexp(lse, its)
    return out, lse


def add_gradients(
    call: Call, rows: Rows, given: tuple[Tensor, Tensor, Tensor], into: tuple[Tensor, ...]
) -> None:
    """Add their part to the gradients of query, key and value.

    Args:
        call: as it was computed.
        rows: some of its rows.
        given: gradient of the results, the results, and their log-sum-exp, all of all rows.
        into: what is added to, in the shapes of query, key and value.
    """
    q, grad, out, lse = (x[rows.batch, :, rows.queries] for x in (call.query, *given))
    heads, hkv = call.query.shape[1], call.key.shape[1]
    for kind, keys in rows.ranges:
        k, v = call.key[rows.batch, :, keys], call.value[rows.batch, :, keys]
        if kind is Kind.BAND:
            made = band_backward(grad, q, k, v, out, lse, call.scale)
        else:
            k, v = (x.repeat_interleave(heads // hkv, 1) for x in (k, v))
            is_causal = kind is Kind.CAUSAL
            made = flash_backward(grad, q, k, v, out, lse, 0.0, is_causal, scale=call.scale)
        for at, x, whole in zip((rows.queries, keys, keys), made, into, strict=True):
            whole[rows.batch, :, at] += x.unflatten(1, (whole.shape[1], -1)).sum(2)


def _length(x: slice) -> int:
    return int(x.stop - x.start)


def _pairs(kind: Kind, rows: int, keys: int) -> int:
    if kind is Kind.CAUSAL:
        return rows * (rows + 1) // 2
    return rows * (keys - rows + STEP if kind is Kind.BAND else keys)


def _documents(call: Call, batch: slice) -> Iterator[tuple[slice, slice | None]]:
    """Rows, and the keys outside of which they see none; None if that is no range, or not all that masks."""
    t, s = call.query.shape[-2], call.key.shape[-2]
    if t < _FEW or not _has_bounds_alone(call):
        yield slice(0, t), None
    elif call.mask is not None:
        yield slice(0, t), _run_of(part(call.mask, batch, slice(0, t), slice(0, s)))
    elif call.query_ids is None or call.key_ids is None:
        yield slice(0, t), slice(0, s)
    elif (lengths := _lengths(call.query_ids, call.key_ids, batch)) is None:
        yield slice(0, t), None
    else:
        start = 0
        for few, several in itertools.groupby(lengths, key=lambda n: n < _FEW):
            for n in [sum(several)] if few else several:
                rows = slice(start, start + n)
                yield rows, None if few else rows
                start += n


def _has_bounds_alone(call: Call) -> bool:
    """Whether band and ids, or band and one range of keys, tell all, in a call that the kernel takes."""
    query, value, mask = call.query, call.value, call.mask
    scored = call.bias is not None or call.sinks is not None or bool(call.softcap)
    fits = query.shape[-1] == value.shape[-1] and query.dtype in DTYPES and query.dtype == value.dtype
    if scored or not fits or not query.numel() or not value.numel():
        return False
    if call.query_ids is not None:
        return mask is None and not call.anchors and not call.prefix
    return mask is None or is_over_keys(mask)


def _run_of(seen: Tensor) -> slice | None:
    """The keys that a mask `[..., s]` leaves open, if they are one range, the same of all heads."""
    rows = seen.reshape(-1, seen.shape[-1])
    (at,) = rows[0].nonzero(as_tuple=True)
    whole = len(at) > 0 and int(at[-1] - at[0]) + 1 == len(at) and bool((rows == rows[0]).all())
    return slice(int(at[0]), int(at[-1]) + 1) if whole else None


def _lengths(query_ids: Tensor, key_ids: Tensor, batch: slice) -> list[int] | None:
    """Lengths of documents that lie in a row, rows and keys alike; None if they lie otherwise."""
    rows, keys = (ids if ids.dim() == 1 or ids.shape[0] == 1 else ids[batch] for ids in (query_ids, key_ids))
    rows, keys = rows.reshape(-1), keys.reshape(-1)
    if rows.shape != keys.shape or not torch.equal(rows, keys):
        return None
    ids, lengths = torch.unique_consecutive(rows, return_counts=True)
    return lengths.tolist() if len(ids.unique()) == len(ids) else None


def _in_range(call: Call, batch: slice, queries: slice, keys: slice) -> Iterator[Rows]:
    """Rows that see keys of one range by the band alone, cut where what they see changes its form."""
    ends = (queries.start, queries.stop)
    begins = max(keys.start, call.anchors)
    changes = (begins - call.low + 1, *(x - call.high for x in (call.prefix, keys.start, keys.stop)))
    cuts = sorted({*ends, *(x for x in changes if ends[0] < x < ends[1])})
    for start, stop in itertools.pairwise(cuts):
        rows = slice(start, stop)
        ranges = _ranges(call, rows, keys)
        rest = (stop - start) % STEP if (Kind.BAND in [kind for kind, _ in ranges]) else 0
        if stop - start - rest < _FEW:
            ranges, rest = (), 0
        if rest:
            rows = slice(start, stop - rest)
            ranges = _ranges(call, rows, keys)
        yield Rows(batch, rows, ranges)
        if rest:
            yield Rows(batch, slice(stop - rest, stop))


def _ranges(call: Call, rows: slice, keys: slice) -> tuple[tuple[Kind, slice], ...]:
    """What rows see between two of these cuts; nothing if a mask has to tell."""
    first, last = rows.start + call.low, rows.start + call.high + 1
    behind = keys.start < call.prefix and last <= call.prefix
    if first > max(keys.start, call.anchors):
        if behind or last > keys.stop or last <= first:
            return ()
        band = (Kind.BAND, slice(first, rows.stop + call.high))
        return ((Kind.ALL, slice(keys.start, call.anchors)), band) if call.anchors > keys.start else (band,)
    if behind or last >= keys.stop:
        return ((Kind.ALL, slice(keys.start, min(keys.stop, call.prefix) if behind else keys.stop)),)
    if last <= keys.start:
        return ()
    causal = (Kind.CAUSAL, slice(last - 1, rows.stop + call.high))
    return ((Kind.ALL, slice(keys.start, last - 1)), causal) if last - 1 > keys.start else (causal,)
