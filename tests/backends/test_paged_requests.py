"""Attention over pages: the op against plain attention over keys in order, the CPU kernel against the op."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from effopt.backends.base import choose
from effopt.backends.paged_gathered import LOWERINGS as GATHERED_LOWERINGS
from effopt.backends.paged_requests import LOWERINGS
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.target import target_of

(BY_REQUEST,) = LOWERINGS
(GATHERED,) = GATHERED_LOWERINGS
CPU = target_of(torch.device("cpu"))
RUNS = pytest.mark.parametrize(
    "run",
    [ops.paged_attention.overload, BY_REQUEST.run, GATHERED.run],
    ids=["op", "by-request", "gathered"],
)
Run = Callable[..., Tensor]


def paged(keys: list[Tensor], page: int, slots: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A pool of `[hkv, n, d]` of each request in shuffled pages, its table and lengths; the rest is NaN."""
    room = max(1, max(-(-x.shape[1] // page) for x in keys))
    order = torch.randperm(len(keys) * room)
    hkv, _, d = keys[0].shape
    pool = keys[0].new_full((len(order), hkv, page, d), math.nan)
    if slots:
        pool = pool.transpose(1, 2).contiguous().transpose(1, 2)
    table = order.view(len(keys), room)
    for pages, x in zip(table, keys, strict=True):
        for j in range(x.shape[1]):
            pool[pages[j // page], :, j % page] = x[:, j]
    lengths = torch.tensor([x.shape[1] for x in keys])
    table = torch.where(torch.arange(room) * page < lengths[:, None], table, 10**6)
    return pool, table.int(), lengths.int()


@RUNS
@pytest.mark.parametrize("page", [1, 5, 16])
@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("slots", [False, True])
def test_as_attention_over_keys_in_order(run: Run, page: int, t: int, slots: bool) -> None:
    """Each request alone, the band counted from its last key; grouped heads, unequal head sizes, soft-cap."""
    torch.manual_seed(0)
    lengths = [0, 1, 3, 16, 37]
    cases = ((8, 0.0), (5, 0.0), (8, 2.0))
    # What the library's kernel does not take it refuses: `test_opcheck_and_choice`.
    for dv, softcap in cases[:1] if run == GATHERED.run else cases:
        keys, values = ([torch.randn(2, n, size) for n in lengths] for size in (8, dv))
        q = torch.randn(len(lengths), 4, t, 8)
        torch.manual_seed(1)
        key_pages, table, held = paged(keys, page, slots)
        torch.manual_seed(1)
        value_pages, _, _ = paged(values, page, slots)
        got = run(q, key_pages, value_pages, table, held, scale=0.3, softcap=softcap)
        assert got.shape == (*q.shape[:-1], dv)
        assert torch.equal(got[0], torch.zeros_like(got[0]))
        for i, n in enumerate(lengths[1:], 1):
            alone = ops.attention.reference(
                q[i : i + 1], keys[i][None], values[i][None],
                scale=0.3, softcap=softcap, high=n - t, zero_masked_rows=True,
            )  # fmt: skip
            torch.testing.assert_close(got[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@RUNS
def test_pages_that_requests_share(run: Run) -> None:
    """One prefix in the tables of all, and a table twice as long as it need be."""
    torch.manual_seed(0)
    pool, q = torch.randn(6, 2, 4, 8), torch.randn(3, 2, 1, 8)
    table = torch.tensor([[2, 2, 5, 0], [2, 1, 0, 0], [2, 5, 5, 5]])
    got = run(q, pool, pool, table, torch.tensor([12, 6, 99]), scale=0.5)
    for i, n in enumerate((12, 6, 16)):
        key = pool[table[i]].transpose(0, 1).flatten(1, 2)[None, :, :n]
        alone = ops.attention.reference(q[i : i + 1], key, key, scale=0.5)
        torch.testing.assert_close(got[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@RUNS
def test_a_page_outside_of_the_pool_is_an_error(run: Run) -> None:
    pool, q = torch.randn(6, 2, 4, 8), torch.randn(1, 2, 1, 8)
    for page in (-1, 6):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            run(q, pool, pool, torch.tensor([[0, page]]), torch.tensor([5]), scale=1.0)
        run(q, pool, pool, torch.tensor([[0, page]]), torch.tensor([4]), scale=1.0)


@pytest.mark.slow
def test_a_page_before_the_pool_is_an_error_in_compiled_code() -> None:
    """Which takes -1 for the last page, left to itself."""
    pool, q = torch.randn(6, 2, 4, 8), torch.randn(1, 2, 1, 8)
    options = {"lowering": "reference"}
    call = torch.compile(partial(ops.paged_attention.overload, scale=1.0), backend="effopt", options=options)
    with torch.no_grad():
        call(q, pool, pool, torch.tensor([[0, 5]]), torch.tensor([5]))
        with pytest.raises(RuntimeError, match="out of bounds"):
            call(q, pool, pool, torch.tensor([[0, -1]]), torch.tensor([5]))


def test_gradients_of_the_op() -> None:
    """Nothing of what is not finite, and beyond a length, reaches them."""
    torch.manual_seed(0)
    pool, table, lengths = paged([torch.randn(2, n, 4) for n in (3, 0, 6)], 4)
    leaves = [torch.randn(3, 2, 1, 4).requires_grad_(), pool.clone().requires_grad_(), pool.requires_grad_()]
    ops.paged_attention.overload(*leaves, table, lengths, scale=0.5).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0


def test_opcheck_and_choice() -> None:
    torch.manual_seed(0)
    pool, table, lengths = paged([torch.randn(2, n, 8) for n in (3, 40)], 4)
    q = torch.randn(2, 4, 1, 8)
    torch.library.opcheck(
        torch.ops.effopt_cpu.paged_attention.default, (q, pool, pool, table, lengths), {"scale": 1.0}
    )
    large = torch.empty(4096, 8, 16, 128, device="meta")
    given = (
        torch.empty(4, 32, 1, 128, device="meta"),
        large,
        large,
        torch.zeros(4, 256).int(),
        lengths[:1].expand(4),
    )
    bound = ops.paged_attention.bind(given, {"scale": 1.0})
    candidates = [BY_REQUEST, GATHERED, reference_lowering(ops.paged_attention)]
    assert choose(candidates, CPU, bound, given[0], False).lowering is BY_REQUEST
    refused = choose(candidates, CPU, bound, given[0], True).refused
    assert "has no backward" in dict(refused)["by-request"]
    refused = choose(candidates, CPU, bound | {"softcap": 3.0}, given[0], False).refused
    assert "has no soft-cap" in dict(refused)["gathered"]
    refused = choose(candidates, CPU, bound | {"value_pages": large[..., :64]}, given[0], False).refused
    assert "wants equal head sizes" in dict(refused)["gathered"]


def test_many_short_requests_are_gathered_together() -> None:
    """64 requests of up to 32 keys: a call for each would take longer than reading twice as much."""
    pool = torch.empty(256, 2, 16, 32, device="meta")
    q, table = torch.empty(64, 4, 1, 32, device="meta"), torch.zeros(64, 2).int()
    bound = ops.paged_attention.bind((q, pool, pool, table, table[:, 0]), {"scale": 1.0})
    candidates = [BY_REQUEST, GATHERED, reference_lowering(ops.paged_attention)]
    assert choose(candidates, CPU, bound, q, False).lowering is GATHERED


def test_costs_and_contents() -> None:
    """The pool is not counted, and what is measured has pages that are there and requests of all lengths."""
    pool = torch.zeros(10_000, 2, 16, 8)
    given = torch.zeros(4, 2, 1, 8), pool, pool, torch.zeros(4, 8).int(), torch.zeros(4).long()
    bound = ops.paged_attention.bind(given, {"scale": 1.0})
    assert ops.paged_attention.bytes_moved(bound, given[0]) < 4 * 8 * 16 * 2 * 8 * 2 * 4
    assert ops.paged_attention.contents is not None
    made = ops.paged_attention.contents(bound)
    assert made["lengths"].tolist() == [32, 64, 96, 128]
    assert made["lengths"].dtype == torch.int64
    assert len(made["page_table"].unique()) == 32
    assert made["page_table"].dtype == torch.int32
