"""Attention over gathered pages: what is odd in pools, tables, sizes and dtypes keeps what eager gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.compile import record
from tests.passes.attention.paged_cases import (
    HKV,
    LENGTHS,
    NAME,
    PAGE,
    PAGES,
    POOL,
    TABLE,
    VALUES,
    B,
    D,
    H,
    Q,
    assert_recognised,
    by_index,
    by_index_select,
    over,
    reasons,
    softmaxed,
)
from tests.passes.conftest import run_compiled


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

    assert_recognised(run, torch.randn(b, 4, t, D), pool, table, lengths)


def test_pages_below_0_are_those_from_the_end() -> None:
    got = assert_recognised(over(by_index), Q, POOL, VALUES, TABLE - PAGES, LENGTHS)
    assert torch.equal(got, assert_recognised(over(by_index), Q, POOL, VALUES, TABLE, LENGTHS))


def test_pages_outside_of_the_pool() -> None:
    """Eager asks all of the table, the op those that are seen. A fill of -1 beyond a length is no page."""
    table = torch.tensor([[4, 0, -1], [3, 1, 5]])
    assert_recognised(over(by_index), Q, POOL, VALUES, table, LENGTHS)
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


def test_dtypes_and_softcap() -> None:
    def capped(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        hide = lambda x, at: (2 * torch.tanh(x / 2)).masked_fill(at >= lengths.view(-1, 1, 1, 1), -math.inf)  # noqa: E731
        return softmaxed(q, by_index(keys, table), by_index(values, table), hide)

    assert_recognised(capped, Q, POOL, VALUES, TABLE, LENGTHS)
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
