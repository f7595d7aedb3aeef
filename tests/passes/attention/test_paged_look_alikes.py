"""Attention over gathered keys that is no attention over pages, and what the reason says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.attention.paged_cases import (
    LENGTHS,
    NAME,
    POOL,
    TABLE,
    VALUES,
    B,
    D,
    H,
    Q,
    assert_refused,
    attend,
    below,
    by_index,
    over,
    reasons,
    softmaxed,
)
from tests.passes.conftest import run_compiled

Function = Callable[..., Tensor]
GIVEN = (Q, POOL, VALUES, TABLE, LENGTHS)
sdpa = F.scaled_dot_product_attention


def laid_out(picked: Tensor) -> Tensor:
    return picked.flatten(1, 2).transpose(1, 2)


PLACES: dict[str, tuple[str, Function]] = {
    "other columns for the values": (
        "one table serves both",
        lambda q, k, v, table, n: attend(q, by_index(k, table), by_index(v, table.flip(1)), n),
    ),
    "values that are not gathered": (
        "only one of keys and values is gathered: the values are not",
        lambda q, k, v, table, n: attend(q, by_index(k, table), v[:6].view(2, 12, 2, 8).transpose(1, 2), n),
    ),
    "a table read column by column": (
        "does not say, at [request, key // 4]",
        lambda q, k, v, table, n: attend(
            q, *(laid_out(x[table.T].reshape(2, 3, 4, 2, 8)) for x in (k, v)), n
        ),
    ),
    "tokens of all pages interleaved": (
        "laid out in another order",
        lambda q, k, v, table, n: attend(q, *(laid_out(x[table].transpose(1, 2)) for x in (k, v)), n),
    ),
    "heads that take turns": (
        "only views and repeated heads are followed",
        lambda q, k, v, table, n: attend(q, *(by_index(x, table).repeat(1, 2, 1, 1) for x in (k, v)), n),
    ),
    "keys from the second on": (
        "laid out in another order",
        lambda q, k, v, table, n: attend(q, *(by_index(x, table)[:, :, 1:] for x in (k, v)), n),
    ),
    "keys in reverse": (
        "only views and repeated heads are followed",
        lambda q, k, v, table, n: attend(q, *(by_index(x, table).flip(2) for x in (k, v)), n),
    ),
    "keys that are scaled": (
        "mul (aten.mul.Tensor) is between the keys and what is gathered",
        lambda q, k, v, table, n: attend(q, by_index(k, table) * n.view(-1, 1, 1, 1), by_index(v, table), n),
    ),
    "new keys behind those of the pages": (
        "cat (aten.cat.default) is between the keys",
        lambda q, k, v, table, n: attend(
            q, *(torch.cat([by_index(x, table), x[:2, :1].transpose(1, 2)], 2) for x in (k, v)), n
        ),
    ),
    "pages of other sizes": (
        "pools of keys and values have (pages, heads, page) (7, 2, 4) and (14, 2, 2)",
        lambda q, k, v, table, n: attend(
            q, by_index(k, table), laid_out(v.view(14, 2, 2, 8)[table.repeat_interleave(2, 1)]), n
        ),
    ),
    "a slot and a page that two tensors say": (
        "by several tensors",
        lambda q, k, v, table, n: attend(
            q, *(x[table.repeat_interleave(4, 1), torch.arange(12) % 4].transpose(1, 2) for x in (k, v)), n
        ),
    ),
    "pages of a narrower dtype": (
        "is between the keys and what is gathered",
        lambda q, k, v, table, n: attend(q, *(by_index(x.half(), table).float() for x in (k, v)), n),
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_places(case: str) -> None:
    reason, function = PLACES[case]
    assert_refused(reason, function, *GIVEN)


def hidden(seen: Function, t: int = 1, **given: bool) -> Function:
    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        rows, places = torch.arange(t)[:, None], torch.arange(k.shape[2])
        return sdpa(q, k, v, seen(places, rows, lengths.view(-1, 1, 1, 1)), enable_gqa=True, **given)

    return run


MASKS: dict[str, tuple[str, int, Function]] = {
    "more than a length": ("not proved to hide just", 1, lambda at, i, n: (at < n) & (at % 3 > 0)),
    "the other side": ("not proved to hide just", 1, lambda at, i, n: at >= n - 9),
    "not the first keys by a length": ("not proved to hide just", 1, lambda at, i, n: at * at < n),
    "queries in both directions": ("queries see keys after their own", 3, lambda at, i, n: at < n),
    "a window": ("is a window", 3, lambda at, i, n: (at <= n - 3 + i) & (at > n - 6 + i)),
    "a length before the last query": (
        "beyond one length, and has the last query at another",
        3,
        lambda at, i, n: (at <= n - 3 + i) & (at < n - 1),
    ),
    "a length of another tensor": (
        "beyond one length, and has the last query at another",
        3,
        lambda at, i, n: (at <= n - 3 + i) & (at < n.flip(0)),
    ),
    "queries in reverse": ("not proved to hide just", 3, lambda at, i, n: at <= n - 1 - i),
    "queries apart by two": ("not proved to hide just", 3, lambda at, i, n: at <= n - 6 + 2 * i),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(case: str) -> None:
    reason, t, seen = MASKS[case]
    q = torch.randn(B, H, t, D)
    assert_refused(reason, hidden(seen, t), q, *GIVEN[1:])


def test_lengths_of_heads() -> None:
    """As many requests as heads, and a mask that lacks a dimension."""

    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        return sdpa(q, k, v, below(k, lengths)[:, 0], enable_gqa=True)

    table = torch.randint(7, (4, 3))
    assert_refused(
        "differs between heads", run, torch.randn(4, 4, 1, 8), POOL, VALUES, table, torch.arange(4) + 3
    )


def test_scores_with_more_to_them() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(-1, 1, 1)

    def alibi(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        return softmaxed(
            q, k, v, lambda x, at: (x + slopes * at).masked_fill(at >= lengths.view(-1, 1, 1, 1), -torch.inf)
        )

    def weights_too(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table).repeat_interleave(2, 1) for x in (keys, values))
        weights = (q @ k.mT).masked_fill(~below(k, lengths), -torch.inf).softmax(-1)
        return torch.cat([weights @ v, weights], -1)

    def keys_too(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        return attend(q, k, v, lengths) + k.sum()

    assert_refused("the op over pages has no bias", alibi, *GIVEN)
    assert_refused("also read by", keys_too, *GIVEN)
    with torch.no_grad():
        got, report = run_compiled(weights_too, *GIVEN)
    assert not report.counts[NAME]
    torch.testing.assert_close(got, weights_too(*GIVEN), rtol=1e-5, atol=1e-5)


def test_fills_that_leave_weights() -> None:
    """Where a request may have no keys, a finite fill is a mean of values; one near the scores hides none."""

    def filled(fill: float) -> Function:
        def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
            k, v = (by_index(x, table) for x in (keys, values))
            return softmaxed(q, k, v, lambda x, at: x.masked_fill(at >= lengths.view(-1, 1, 1, 1), fill))

        return run

    none = torch.tensor([0, 5])
    assert_refused("a request without keys gives a mean", filled(-1e38), *GIVEN[:4], none)
    assert_refused("not far below every score", filled(-10.0), *GIVEN)

    def added(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        return sdpa(q, k, v, torch.where(below(k, lengths), 0.0, -1e38), enable_gqa=True)

    assert_refused("a request without keys gives a mean", added, *GIVEN[:4], none)


def test_pools_that_are_written_between() -> None:
    """In eager too the attention sees what was gathered before; with two pools in one it is the same pool."""

    def later(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        keys[table[:, 0], 1] = q[:, :2, 0]
        return attend(q, k, v, lengths)

    def through_a_view(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        keys.view(-1, 2, 8)[5] = 1.0
        return attend(q, k, v, lengths)

    for function in (later, through_a_view):
        assert_refused("after they are gathered", function, *GIVEN)


def test_training() -> None:
    """No kernel for pages has gradients: attention stays, and so do they."""
    ours, theirs = ([x.clone().requires_grad_() for x in GIVEN[:3]] for _ in range(2))
    got, report = run_compiled(over(by_index), *ours, *GIVEN[3:])
    want = over(by_index)(*theirs, *GIVEN[3:])
    assert not report.counts[NAME]
    assert "training: no kernel here gives gradients" in reasons(report)
    got.sum().backward()
    want.sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_a_packed_batch_of_transformers() -> None:
    """Continuous batching: queries and keys of all requests in one row, and a mask from outside.

    `PagedAttentionCache.update` gathers single tokens of all requests, and `paged|eager` adds a mask that is
    an input: no graph says which keys are whose. (Both are left out of graphs by `torch.compiler.disable`.)
    """

    def packed(q: Tensor, keys: Tensor, values: Tensor, read: Tensor, mask: Tensor) -> Tensor:
        k, v = (x.view(-1, 2, 8).index_select(0, read).transpose(0, 1)[None] for x in (keys, values))
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(1, 4, -1, 8) for x in (k, v))
        return (q @ k.mT / math.sqrt(8) + mask).softmax(-1) @ v

    read = torch.randint(28, (9,))
    mask = torch.where(torch.block_diag(torch.ones(1, 5), torch.ones(1, 4)) > 0, 0.0, -torch.inf)
    assert_refused(
        "is not proved to hide keys", packed, torch.randn(1, 4, 2, 8), POOL, VALUES, read, mask[None, None]
    )


def test_attention_over_anything_else_is_not_reported() -> None:
    plain = lambda q, k, n: sdpa(q, k, k, below(k, n))  # noqa: E731
    with torch.no_grad():
        _, report = run_compiled(plain, torch.randn(2, 4, 1, 8), torch.randn(2, 4, 9, 8), LENGTHS)
    assert not reasons(report)
