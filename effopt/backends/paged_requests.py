"""Attention over pages on a CPU, request by request: what lies beyond a length is not gathered.

The reference gathers all that a table has room for, and passes over all its scores several times. Here a
request's own pages become keys and values in one copy, and PyTorch's kernel attends to them; the op's
reference does where that kernel has no soft-cap or wants equal head sizes.

Source: Kwon et al. 2023, arXiv:2309.06180, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.backends.base import Lowering, by_operands
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint
from effopt.graph.ops.paged_attention import check_call
from effopt.target import Target

_REQUEST_S = 7e-5
"""Seconds that a request takes beside its bytes, by guess: two gathers, one call, one copy of the result."""
_GATHER = 3.0
"""Keys and values are read from their pages, written in order, and read again."""
_STEPWISE = 2.0
"""How much longer soft-cap and unequal head sizes take, which the reference computes step by step."""


def _gathered(pages: Tensor, own: Tensor) -> Tensor:
    """`[1, hkv, room, d]` of the pages of one request.

    By their first dimension, and in the order in which they lie: so `index_select` copies whole pages, and
    single numbers along another dimension, or of what is not contiguous.
    """
    if pages.stride(1) < pages.stride(2):
        return pages.transpose(1, 2).index_select(0, own).flatten(0, 1).transpose(0, 1)[None]
    return pages.index_select(0, own).transpose(0, 1).flatten(1, 2)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, length: int, scale: float, softcap: float) -> Tensor:
    """The rows of one request, `[1, h, t, d]` over `[1, hkv, n, d]`."""
    t, n = query.shape[2], key.shape[2]
    seen = None
    if t > 1:
        seen = torch.arange(n) <= torch.arange(length - t, length).unsqueeze(-1)
    if softcap or query.shape[-1] != value.shape[-1]:
        out: Tensor = ops.attention.reference(
            query, key, value, scale=scale, softcap=softcap, mask=seen, zero_masked_rows=True
        )
        return out
    if t == 1:
        # The heads of a group as rows of one: keys are read once, not once for each of them.
        rows = query.reshape(1, key.shape[1], -1, query.shape[-1])
        out = F.scaled_dot_product_attention(rows, key, value, scale=scale)
        return out.reshape(query.shape)
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=grouped)


@torch.library.custom_op(
    "effopt_cpu::paged_attention",
    mutates_args=(),
    schema=ops.paged_attention.schema,
    device_types="cpu",
)
def _forward(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    check_call(query, key_pages, value_pages, page_table, lengths)
    out = query.new_zeros((*query.shape[:-1], value_pages.shape[-1]))
    query = query if query.stride(-1) == 1 else query.contiguous()
    page = key_pages.shape[2]
    for i, length in enumerate(lengths.tolist() if out.numel() else ()):
        n = min(length, page * page_table.shape[1])
        if n <= 0:
            continue
        own = page_table[i, : -(-n // page)]
        key, value = (_gathered(x, own)[:, :, :n] for x in (key_pages, value_pages))
        out[i] = _attend(query[i : i + 1], key, value, length, scale, softcap)[0]
    return out


@_forward.register_fake
def _(query: Tensor, key_pages: Tensor, value_pages: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value_pages.shape[-1]))


@by_operands(ops.paged_attention)
def paged_attention(operands: Operands) -> Tensor:
    """`ops.paged_attention` on a CPU, reading only what requests hold; arguments as there."""
    out: Tensor = _forward(**operands)
    return out


def _supports(target: Target, operands: Operands) -> str | None:
    if target.device_type != "cpu":
        return f"runs on a CPU, this is {target.device_type}"
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline of what requests hold by guess, copied once, and a constant for each request."""
    op = ops.paged_attention
    work, moved = op.flops(operands, result), _GATHER * op.bytes_moved(operands, result)
    unequal = operands["key_pages"].shape[-1] != operands["value_pages"].shape[-1]
    steps = _STEPWISE if operands["softcap"] or unequal else 1.0
    least = max(moved / target.bytes_per_s, work / target.flops_per_s)
    return steps * least + _REQUEST_S * hint(operands["lengths"].shape[0])


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(ops.paged_attention, "by-request", paged_attention, _supports, _cost, differentiable=False),
)
