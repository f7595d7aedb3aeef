"""Attention over selected blocks of keys on a CPU: what is not selected is not read.

A block of queries of one head and its selected blocks of keys are one small attention. Those with as many
blocks, and the same edge, are gathered and run together: one `scaled_dot_product_attention` for all of them.
At most one block of a row has an edge: that of the queries themselves under causality, or the ragged last
one; in ascending order it is the last. All others need no mask.

Source: Dao et al. 2022, arXiv:2205.14135, section 3.3 (blocks that are not selected are not read).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.backends.base import Lowering
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint
from effopt.graph.ops.block_sparse_attention import blocks_in, mean_of_values
from effopt.target import Target

_GATHERED_BYTES = 2**22
"""Of keys and values that one call gathers, as far as that is more than one row: they stay in the cache."""
_TILE_S = 2e-6
"""Seconds that a block of queries takes beside its arithmetic: its share of sorting and of a call."""
_GATHER = 1.5
"""How much longer gathered keys take than keys in place."""
_STEPWISE = 2.0
"""How much longer a soft-cap takes, which the reference computes step by step."""


@dataclass(frozen=True)
class Call:
    """One call of the op on real tensors."""

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: Tensor
    block: int
    scale: float
    is_causal: bool
    softcap: float
    key_mask: Tensor | None
    masked_rows: str


@dataclass(frozen=True)
class Group:
    """Rows of blocks that are computed in one call."""

    batch: Tensor
    """int64 `[n]`, as the next two."""
    head: Tensor
    row: Tensor
    columns: Tensor
    """Selected blocks of keys, ascending, int64 `[n, count]`."""
    diagonal: bool
    """Whether the last block of each row is that of the queries themselves, under causality."""


def groups_of(call: Call) -> Iterator[Group]:
    """All rows with a block: each in one group."""
    b, h, t, _ = call.query.shape
    s = call.key.shape[-2]
    rows, columns = blocks_in(t, call.block), blocks_in(s, call.block)
    selected = call.blocks.expand(b, h, rows, columns)
    if call.is_causal:
        selected = selected.tril()
    selected = selected.reshape(-1, columns)
    row = torch.arange(b * h * rows) % rows
    counts = selected.sum(-1)
    on_diagonal = torch.zeros_like(counts)
    if call.is_causal:
        inside = row < columns
        on_diagonal[inside] = selected[inside].gather(1, row[inside].unsqueeze(1)).squeeze(1).long()
    row_bytes = 2 * call.block * call.key.shape[-1] * call.key.element_size()
    for kind in torch.unique(2 * counts + on_diagonal).tolist():
        count, diagonal = divmod(int(kind), 2)
        if not count:
            continue
        (at,) = (2 * counts + on_diagonal == kind).nonzero(as_tuple=True)
        for part in at.split(max(1, _GATHERED_BYTES // (count * row_bytes))):
            chosen = selected[part].nonzero()[:, 1].view(-1, count)
            line = part // rows
            yield Group(line // h, line % h, row[part], chosen, bool(diagonal))


def forward(call: Call) -> Tensor:
    """The op, group by group."""
    b, h, t, _ = call.query.shape
    s, dv, block = call.key.shape[-2], call.value.shape[-1], call.block
    t_more, s_more = -t % block, -s % block
    query = F.pad(call.query, (0, 0, 0, t_more)).unflatten(2, (-1, block))
    key, value = (F.pad(x, (0, 0, 0, s_more)).unflatten(2, (-1, block)) for x in (call.key, call.value))
    key_mask = call.key_mask
    if key_mask is not None and bool(key_mask.all()):
        key_mask = None
    if key_mask is not None:
        key_mask = F.pad(key_mask, (0, s_more)).unflatten(-1, (-1, block)).expand(b, -1, -1)
    out = call.query.new_zeros((b, h, query.shape[2], block, dv))
    sees = torch.zeros((b, h, query.shape[2], block, 1), dtype=torch.bool)
    group = h // call.key.shape[1]
    for part in groups_of(call):
        at = (part.batch.unsqueeze(-1), (part.head // group).unsqueeze(-1), part.columns)
        q = query[part.batch, part.head, part.row].unsqueeze(1)
        k, v = (x[at].flatten(1, 2).unsqueeze(1) for x in (key, value))
        seen = _seen(part, block, s, key_mask)
        out[part.batch, part.head, part.row] = _attend(call, q, k, v, seen).squeeze(1)
        sees[part.batch, part.head, part.row] = _any_key(seen)
    out, sees = (x.flatten(2, 3)[:, :, :t] for x in (out, sees))
    if call.masked_rows == "zero" or bool(sees.all()):
        return out.contiguous()
    other = mean_of_values(call.value, h) if call.masked_rows == "mean" else math.nan
    return torch.where(sees, out, other)


def _any_key(seen: Tensor | None) -> Tensor:
    """Whether the rows of a group see a key: `[n or 1, block or 1, 1]`."""
    return torch.ones(1, 1, 1, dtype=torch.bool) if seen is None else seen.any(-1, keepdim=True).squeeze(1)


def _seen(part: Group, block: int, s: int, key_mask: Tensor | None) -> Tensor | None:
    """Which gathered keys the rows of a group see: `[n or 1, 1, block or 1, count * block]`; None: all."""
    width = part.columns.shape[1] * block
    seen: Tensor | None = None
    last = blocks_in(s, block) - 1
    if key_mask is not None:
        seen = key_mask[part.batch.unsqueeze(-1), part.columns].flatten(1)[:, None, None, :]
    elif s % block and bool((part.columns[:, -1] == last).any()):
        places = part.columns.unsqueeze(-1) * block + torch.arange(block)
        seen = (places < s).flatten(1)[:, None, None, :]
    if part.diagonal:
        below = torch.arange(width) - (width - block) <= torch.arange(block).unsqueeze(-1)
        seen = below[None, None] if seen is None else seen & below
    return seen


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    if call.softcap:
        settings = {"scale": call.scale, "softcap": call.softcap}
        out: Tensor = ops.attention.reference(q, k, v, mask=seen, zero_masked_rows=True, **settings)
        return out
    if seen is not None:
        # As numbers, which the kernel would else make of it, and without a copy for each row of blocks.
        added = q.new_zeros(seen.shape).masked_fill(~seen, -math.inf)
        seen = added.expand(q.shape[0], 1, q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, seen, scale=call.scale)


@torch.library.custom_op(
    "effopt_cpu::block_sparse_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor blocks, int block, float scale, bool is_causal,"
    " float softcap, Tensor? key_mask, str masked_rows) -> Tensor",
    device_types="cpu",
)
def _forward(*given: Any) -> Tensor:
    return forward(Call(*given))


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    *,
    block: int,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    key_mask: Tensor | None = None,
    masked_rows: str = "nan",
    density: float = 1.0,
) -> Tensor:
    """`ops.block_sparse_attention` without the keys that are not selected; arguments as there."""
    return _forward(query, key, value, blocks, block, scale, is_causal, softcap, key_mask, masked_rows)


def _supports(target: Target, operands: Operands) -> str | None:
    if target.device_type != "cpu":
        return f"runs on a CPU, this is {target.device_type}"
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline of what is selected, more for gathering it, and a constant for each block of queries."""
    op, query = ops.block_sparse_attention, operands["query"]
    work = op.flops(operands, result) * _GATHER * (_STEPWISE if operands["softcap"] else 1.0)
    moved = op.bytes_moved(operands, result)
    tiles = math.prod(map(hint, query.shape[:2])) * blocks_in(hint(query.shape[-2]), operands["block"])
    return max(moved / target.bytes_per_s, work / target.flops_per_s) + tiles * _TILE_S


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(
        ops.block_sparse_attention,
        "selected-blocks",
        block_sparse_attention,
        _supports,
        _cost,
        differentiable=False,
    ),
)
