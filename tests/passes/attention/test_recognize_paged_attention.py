"""Attention over gathered pages: spellings of the gather and of lengths, and the values of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.compile import record
from effopt.passes.attention.recognize_paged_attention import RecognizePagedAttention
from effopt.plugins.report import Report
from tests.passes.conftest import run_compiled

NAME = RecognizePagedAttention.name
B, H, HKV, D, PAGE, COLUMNS, PAGES = 2, 4, 2, 8, 4, 3, 7
Q = torch.randn(B, H, 1, D, generator=torch.Generator().manual_seed(0))
POOL = torch.randn(PAGES, PAGE, HKV, D, generator=torch.Generator().manual_seed(1))
VALUES = torch.randn(PAGES, PAGE, HKV, D, generator=torch.Generator().manual_seed(2))
TABLE = torch.tensor([[4, 0, 6], [3, 1, 5]])
LENGTHS = torch.tensor([7, 12])
Function = Callable[..., Tensor]


def reasons(report: Report) -> str:
    return "; ".join(r.reason for r in report.rejected if r.pass_name == NAME)


def recognised(function: Function, *inputs: Tensor, dynamic: bool | None = False) -> Tensor:
    """The result, compiled; that there is no attention left, and that float64 in eager gives the same."""
    copies = [x.clone() for x in inputs]
    with torch.no_grad():
        got, report = run_compiled(function, *copies, dynamic=dynamic)
        wide = [x.double() if x.is_floating_point() else x.clone() for x in inputs]
        want = function(*wide)
    assert not report.faults
    assert report.counts[NAME] == 1, reasons(report)
    assert report.ops["paged_attention"] == 1
    assert not report.ops["attention"]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    return got


def refused(reason: str, function: Function, *inputs: Tensor, **options: Any) -> None:
    with torch.no_grad():
        got, report = run_compiled(function, *(x.clone() for x in inputs), **options)
        want = function(*(x.clone() for x in inputs))
    assert not report.counts[NAME]
    assert reason in reasons(report)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def below(keys: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(keys.shape[2]) < lengths[:, None])[:, None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, below(k, lengths), enable_gqa=k.shape[1] != q.shape[1])


def over(lay_out: Function) -> Function:
    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return attend(q, lay_out(keys, table), lay_out(values, table), lengths)

    return run


def by_index(pool: Tensor, table: Tensor) -> Tensor:
    return pool[table].flatten(1, 2).transpose(1, 2)


def by_index_select(pool: Tensor, table: Tensor) -> Tensor:
    picked = pool.index_select(0, table.flatten()).reshape(table.shape[0], -1, *pool.shape[2:])
    return picked.permute(0, 2, 1, 3)


def by_embedding(pool: Tensor, table: Tensor) -> Tensor:
    return F.embedding(table, pool.view(len(pool), -1)).view(len(table), -1, *pool.shape[2:]).transpose(1, 2)


def by_gather(pool: Tensor, table: Tensor) -> Tensor:
    index = table.reshape(-1, 1, 1, 1).expand(-1, *pool.shape[1:])
    return torch.gather(pool, 0, index).view(len(table), -1, *pool.shape[2:]).transpose(1, 2)


def by_take_along_dim(pool: Tensor, table: Tensor) -> Tensor:
    index = table.reshape(-1, 1, 1, 1).expand(-1, *pool.shape[1:])
    return torch.take_along_dim(pool, index, 0).unflatten(0, table.shape).flatten(1, 2).transpose(1, 2)


def by_slots(pool: Tensor, table: Tensor) -> Tensor:
    """Single tokens of a flat pool, as a slot mapping lists them."""
    slots = (table[:, :, None] * pool.shape[1] + torch.arange(pool.shape[1])).flatten(1)
    return pool.flatten(0, 1)[slots].transpose(1, 2)


def by_flat_slots(pool: Tensor, table: Tensor) -> Tensor:
    slots = (table[:, :, None] * pool.shape[1] + torch.arange(pool.shape[1])).view(-1)
    picked = pool.flatten(0, 1).index_select(0, slots)
    return picked.unflatten(0, (table.shape[0], -1)).transpose(1, 2)


def by_computed_pages(pool: Tensor, table: Tensor) -> Tensor:
    return pool[(table + 1).flatten() - 1].view(len(table), -1, *pool.shape[2:]).transpose(1, 2)


def head_major(pool: Tensor, table: Tensor) -> Tensor:
    return pool.transpose(1, 2).contiguous()[table].transpose(1, 2).flatten(2, 3)


def heads_first(pool: Tensor, table: Tensor) -> Tensor:
    return pool.permute(2, 0, 1, 3).contiguous()[:, table].transpose(0, 1).flatten(2, 3)


def transposed_channels(pool: Tensor, table: Tensor) -> Tensor:
    return pool.permute(0, 2, 3, 1).contiguous()[table].permute(0, 2, 1, 4, 3).reshape(len(table), HKV, -1, D)


def repeated_late(pool: Tensor, table: Tensor) -> Tensor:
    k = by_index(pool, table)
    return k[:, :, None].expand(-1, -1, H // HKV, -1, -1).reshape(k.shape[0], H, -1, D)


def repeated_early(pool: Tensor, table: Tensor) -> Tensor:
    return pool[table].repeat_interleave(H // HKV, dim=3).flatten(1, 2).transpose(1, 2)


def one_of_two(pool: Tensor, table: Tensor) -> Tensor:
    return torch.stack([pool, pool + 1], 1)[table, 1].flatten(1, 2).transpose(1, 2)


def one_of_layers(pool: Tensor, table: Tensor) -> Tensor:
    return torch.stack([pool, pool + 1])[1][table].flatten(1, 2).transpose(1, 2)


LAYOUTS = (
    *(by_index, by_index_select, by_embedding, by_gather, by_take_along_dim, by_slots, by_flat_slots),
    *(by_computed_pages, head_major, heads_first, transposed_channels, repeated_late, repeated_early),
    *(one_of_two, one_of_layers),
)


@pytest.mark.parametrize("lay_out", LAYOUTS, ids=lambda f: f.__name__)
def test_spellings_of_the_gather(lay_out: Function) -> None:
    recognised(over(lay_out), Q, POOL, VALUES, TABLE, LENGTHS)


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
        recognised(function, Q, torch.stack([POOL, VALUES], 1), TABLE, LENGTHS)


@pytest.mark.parametrize(
    ("b", "hkv", "page", "columns", "t"),
    [(1, 2, 4, 3, 1), (3, 1, 4, 2, 1), (2, 4, 1, 9, 1), (2, 2, 5, 1, 1), (1, 1, 1, 2, 1), (4, 2, 3, 3, 2)],
)
def test_sizes_of_one(b: int, hkv: int, page: int, columns: int, t: int) -> None:
    pool, table = torch.randn(2 * columns, page, hkv, D), torch.randint(2 * columns, (b, columns))
    lengths = torch.randint(columns * page + 1, (b,))

    def run(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k = by_index(pool, table)
        rows = (lengths[:, None] - t + torch.arange(t))[:, None, :, None]
        seen = torch.arange(k.shape[2]) <= rows
        return F.scaled_dot_product_attention(q, k, k, seen, enable_gqa=True)

    recognised(run, torch.randn(b, 4, t, D), pool, table, lengths)


def softmaxed(q: Tensor, k: Tensor, v: Tensor, hide: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return hide(scores, torch.arange(k.shape[2])).softmax(-1) @ v


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
    got = recognised(hiding(MASKS[spelling]), Q, POOL, VALUES, TABLE, lengths)
    if spelling == "filled":
        assert bool(got[0].isnan().all()) == (int(lengths[0]) == 0)


def test_absurd_lengths_wrap_nowhere() -> None:
    far = torch.tensor([-(1 << 63), (1 << 63) - 1])
    for spelling in ("filled", "one more"):
        recognised(hiding(MASKS[spelling]), Q, POOL, VALUES, TABLE, far)


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
        recognised(run, torch.randn(B, H, 3, D), POOL, VALUES, TABLE, lengths)


def test_pages_below_0_are_those_from_the_end() -> None:
    got = recognised(over(by_index), Q, POOL, VALUES, TABLE - PAGES, LENGTHS)
    assert torch.equal(got, recognised(over(by_index), Q, POOL, VALUES, TABLE, LENGTHS))


def test_pages_outside_of_the_pool() -> None:
    """Eager asks all of the table, the op those that are seen. A fill of -1 beyond a length is no page."""
    table = torch.tensor([[4, 0, -1], [3, 1, 5]])
    recognised(over(by_index), Q, POOL, VALUES, table, LENGTHS)
    table[0, 2] = PAGES
    with torch.no_grad():
        assert run_compiled(over(by_index), Q, POOL, VALUES, table, LENGTHS)[0].isfinite().all()
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            run_compiled(over(by_index), Q, POOL, VALUES, table, LENGTHS + 5)


def test_hidden_values_that_are_not_finite_have_no_part() -> None:
    """Documented: the original gives NaN by 0 * NaN where a freed page holds NaN, and this does not."""
    keys, values = POOL.clone(), VALUES.clone()
    keys[6], values[6] = math.nan, math.inf
    with torch.no_grad():
        got, report = run_compiled(over(by_index), Q, keys, values, TABLE, LENGTHS)
    assert report.counts[NAME] == 1
    want = over(by_index)(Q, POOL, VALUES, TABLE, LENGTHS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    values[0] = math.nan  # seen: it spoils its request, and no other
    with torch.no_grad():
        got, _ = run_compiled(over(by_index), Q, keys, values, TABLE, LENGTHS)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


def test_one_table_row_and_one_flat_table() -> None:
    def shared(q: Tensor, keys: Tensor, values: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, row.expand(q.shape[0], -1)) for x in (keys, values))
        return attend(q, k, v, lengths)

    def flat(q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
        k, v = (x[pages].view(B, -1, HKV, D).transpose(1, 2) for x in (keys, values))
        return attend(q, k, v, lengths)

    recognised(shared, Q, POOL, VALUES, TABLE[:1], LENGTHS)
    recognised(flat, Q, POOL, VALUES, TABLE.flatten(), LENGTHS)


def test_keys_that_are_cut_off() -> None:
    """Those of one query may be; of several the last would stand elsewhere."""

    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table)[:, :, :9] for x in (keys, values))
        rows = lengths.view(-1, 1, 1, 1) - q.shape[2] + torch.arange(q.shape[2])[:, None]
        seen = torch.arange(9) <= rows
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)

    recognised(run, Q, POOL, VALUES, TABLE, LENGTHS)
    refused("cut off at 9", run, torch.randn(B, H, 2, D), POOL, VALUES, TABLE, LENGTHS)
    columns = lambda q, k, v, table, n: over(by_index)(q, k, v, table[:, :2], n)  # noqa: E731
    recognised(columns, Q, POOL, VALUES, TABLE, LENGTHS)


def test_dtypes_and_softcap() -> None:
    def capped(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        hide = lambda x, at: (2 * torch.tanh(x / 2)).masked_fill(at >= lengths.view(-1, 1, 1, 1), -math.inf)  # noqa: E731
        return softmaxed(q, by_index(keys, table), by_index(values, table), hide)

    recognised(capped, Q, POOL, VALUES, TABLE, LENGTHS)
    with torch.no_grad():
        narrow = [x.bfloat16() for x in (Q, POOL, VALUES)]
        got, report = run_compiled(over(by_index), *narrow, TABLE, LENGTHS)
        want = over(by_index)(*(x.float() for x in narrow), TABLE, LENGTHS)
    assert report.counts[NAME] == 1
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


def test_a_step_that_writes_its_key_first() -> None:
    """As a decode does: the pool of the caller is written, in place, and what is written is seen."""

    def step(q: Tensor, new: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        page = table.gather(1, (lengths // PAGE)[:, None])[:, 0]
        pool.index_put_((page, lengths % PAGE), new)
        return over(by_index)(q, pool, pool, table, lengths + 1)

    new, lengths = torch.randn(B, HKV, D), torch.tensor([6, 11])
    ours, theirs = POOL.clone(), POOL.clone()
    with torch.no_grad():
        got, report = run_compiled(step, Q, new, ours, TABLE, lengths)
        want = step(Q, new, theirs, TABLE, lengths)
    assert report.counts[NAME] == 1, reasons(report)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [1, 3])
def test_requests_columns_and_pages_that_are_symbols(t: int) -> None:
    """Sizes of pages, heads and channels are numbers. One graph serves calls of other sizes."""

    def run(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k = by_index(pool, table)
        rows = lengths.view(-1, 1, 1, 1) - t + torch.arange(t)[:, None]
        hidden = torch.arange(k.shape[2]) > rows
        return softmaxed(q, k, k, lambda scores, _: scores.masked_fill(hidden, -math.inf))

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="effopt", fullgraph=True, options={"lowering": "eager"})
    with torch.no_grad(), record() as report:
        for b, columns, pages in ((2, 3, 7), (3, 5, 9)):
            table = torch.randint(-pages, pages, (b, columns))
            given = (
                torch.randn(b, H, t, D),
                torch.randn(pages, PAGE, HKV, D),
                table,
                torch.randint(1, 10, (b,)),
            )
            for x, dims in zip(given, ([0], [0], [0, 1], [0]), strict=True):
                for dim in dims:
                    torch._dynamo.maybe_mark_dynamic(x, dim)
            want = run(*given)
            torch.testing.assert_close(compiled(*given), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert len(report.graphs) == 1
    assert report.counts[NAME] == 1, reasons(report)


def test_a_flat_table_of_several_sizes_is_read_at_none() -> None:
    """`table.flatten()` of a symbolic number of columns: which request a page is of, no number tells."""
    torch._dynamo.reset()
    table = TABLE.clone()
    torch._dynamo.maybe_mark_dynamic(table, 1)
    with torch.no_grad():
        got, report = run_compiled(over(by_index_select), Q, POOL, VALUES, table, LENGTHS)
        torch.testing.assert_close(got, over(by_index_select)(Q, POOL, VALUES, table, LENGTHS))
    assert "of symbolic sizes, is between the keys" in reasons(report)
