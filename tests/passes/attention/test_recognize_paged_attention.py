"""Attention over gathered pages: every spelling of the gather and of lengths is recognised."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.attention.paged_cases import (
    HKV,
    LAYOUTS,
    LENGTHS,
    POOL,
    TABLE,
    VALUES,
    B,
    D,
    Function,
    H,
    Q,
    assert_recognised,
    assert_refused,
    attend,
    by_index,
    over,
    softmaxed,
)


@pytest.mark.parametrize("lay_out", LAYOUTS, ids=lambda f: f.__name__)
def test_spellings_of_the_gather(lay_out: Function) -> None:
    assert_recognised(over(lay_out), Q, POOL, VALUES, TABLE, LENGTHS)


def test_keys_and_values_of_one_pool() -> None:
    """`[pages, 2, page, hkv, d]` gathered once, by unbinding and by selecting."""

    def unbound(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (x.flatten(1, 2).transpose(1, 2) for x in pool[table].unbind(2))
        return attend(q, k, v, lengths)

    def selected(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        both = pool[table]
        k, v = (both[:, :, i].flatten(1, 2).transpose(1, 2) for i in (0, 1))
        return attend(q, k, v, lengths)

    for function in (unbound, selected):
        assert_recognised(function, Q, torch.stack([POOL, VALUES], 1), TABLE, LENGTHS)


def hiding(hide: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        return softmaxed(q, k, v, lambda scores, places: hide(scores, places, lengths.view(-1, 1, 1, 1)))

    return run


MASKS = {
    "filled": lambda x, at, n: x.masked_fill(at >= n, -math.inf),
    "added": lambda x, at, n: x + torch.where(at < n, 0.0, -math.inf),
    "up to a position": lambda x, at, n: x.masked_fill(~(at <= n - 1), -math.inf),
    "one more": lambda x, at, n: x.masked_fill(at > n, -math.inf),
    "twice as many": lambda x, at, n: x.masked_fill(at >= 2 * n - 3, -math.inf),
    "the least of two": lambda x, at, n: x.masked_fill((at >= n) | (at >= n.flip(0)), -math.inf),
    "counted": lambda x, at, n: x.masked_fill(at >= n.clamp(min=1, max=9), -math.inf),
    "narrow lengths": lambda x, at, n: x.masked_fill(at >= n.to(torch.int16), -math.inf),
    "one for all": lambda x, at, n: x.masked_fill(at >= n[1, 0, 0, 0], -math.inf),
    "a number": lambda x, at, n: x.masked_fill(at >= 5, -math.inf),
    "all": lambda x, at, n: x,
}


@pytest.mark.parametrize("spelling", MASKS)
@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([0, 5]).int()], ids=["int64", "int32, none"])
def test_spellings_of_lengths(spelling: str, lengths: Tensor) -> None:
    """A request without keys is NaN in all of these: so it stays."""
    got = assert_recognised(hiding(MASKS[spelling]), Q, POOL, VALUES, TABLE, lengths)
    if spelling == "filled":
        assert bool(got[0].isnan().all()) == (int(lengths[0]) == 0)


def test_absurd_lengths_wrap_nowhere() -> None:
    far = torch.tensor([-(1 << 63), (1 << 63) - 1])
    for spelling in ("filled", "one more"):
        assert_recognised(hiding(MASKS[spelling]), Q, POOL, VALUES, TABLE, far)


@pytest.mark.parametrize("kind", ["band", "band and length", "past", "from the first"])
def test_several_queries_are_the_last(kind: str) -> None:
    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        t, places, n = q.shape[2], torch.arange(k.shape[2]), lengths.view(-1, 1, 1, 1)
        rows = torch.arange(t)[:, None]
        seen = {
            "band": places <= n - t + rows,
            "band and length": (places <= n - t + rows) & (places < n),
            "past": places <= n + rows,
            "from the first": places <= rows,
        }[kind]
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)

    for lengths in (LENGTHS, torch.tensor([1, 3])):
        assert_recognised(run, torch.randn(B, H, 3, D), POOL, VALUES, TABLE, lengths)


def test_one_table_row_and_one_flat_table() -> None:
    def shared(q: Tensor, keys: Tensor, values: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, row.expand(q.shape[0], -1)) for x in (keys, values))
        return attend(q, k, v, lengths)

    def flat(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
        k, v = (x[pages].view(B, -1, HKV, D).transpose(1, 2) for x in (keys, values))
        return attend(q, k, v, lengths)

    assert_recognised(shared, Q, POOL, VALUES, TABLE[:1], LENGTHS)
    assert_recognised(flat, Q, POOL, VALUES, TABLE.flatten(), LENGTHS)


def test_keys_that_are_cut_off() -> None:
    """Those of one query may be; of several the last would stand elsewhere."""

    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table)[:, :, :9] for x in (keys, values))
        rows = lengths.view(-1, 1, 1, 1) - q.shape[2] + torch.arange(q.shape[2])[:, None]
        seen = torch.arange(9) <= rows
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)

    assert_recognised(run, Q, POOL, VALUES, TABLE, LENGTHS)
    assert_refused("cut off at 9", run, torch.randn(B, H, 2, D), POOL, VALUES, TABLE, LENGTHS)
    columns = lambda q, k, v, table, n: over(by_index)(q, k, v, table[:, :2], n)  # noqa: E731
    assert_recognised(columns, Q, POOL, VALUES, TABLE, LENGTHS)
