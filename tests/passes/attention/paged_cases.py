"""Attention over gathered pages: a pool, a table and lengths, and every spelling of the gather."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


def assert_recognised(function: Function, *inputs: Tensor, dynamic: bool | None = False) -> Tensor:
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


def assert_refused(reason: str, function: Function, *inputs: Tensor, **options: Any) -> None:
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


def softmaxed(q: Tensor, k: Tensor, v: Tensor, hide: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return hide(scores, torch.arange(k.shape[2])).softmax(-1) @ v
