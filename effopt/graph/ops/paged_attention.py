"""Attention of the last tokens of each request over keys and values that lie in pages of a shared pool.

    key_j   = key_pages[page_table[b, j // page], :, j % page],  j < lengths[b]
    row i   stands at  lengths[b] - t + i,  and sees the keys up to its own place
    out     = softmax(softcap(scale * query @ key^T)) @ value

Source: Kwon et al. 2023, arXiv:2309.06180, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.ops.attention import attention
from effopt.graph.ops.base import Operands, Sample, hint, op, tensor_bytes


def held_share(b: int) -> float:
    """Share of a table that requests fill, guessed: lengths spread evenly up to the longest."""
    return (b + 1) / (2 * b) if b else 1.0


def _sizes(operands: Operands) -> tuple[int, int, float]:
    """b, rows of all heads, and the keys that a request holds by guess, at the hints of symbolic sizes."""
    b, h, t, _ = map(hint, operands["query"].shape)
    room = hint(operands["page_table"].shape[1]) * hint(operands["key_pages"].shape[2])
    return b, b * h * t, held_share(b) * room


def _row_sizes(operands: Operands) -> tuple[int, int]:
    return hint(operands["key_pages"].shape[-1]), hint(operands["value_pages"].shape[-1])


def _flops(operands: Operands, _: Any) -> float:
    _, rows, keys = _sizes(operands)
    d, dv = _row_sizes(operands)
    return rows * keys * (2.0 * d + 2.0 * dv + 5.0)


def _least_bytes(operands: Operands, result: Any) -> float:
    """The pages that requests hold, and not the pool."""
    b, _, keys = _sizes(operands)
    pages = operands["key_pages"]
    held = b * keys * hint(pages.shape[1]) * sum(_row_sizes(operands)) * pages.element_size()
    small = [operands[name] for name in ("query", "page_table", "lengths")]
    return float(held + tensor_bytes([*small, result]))


def _reference_bytes(operands: Operands, _: Any) -> float:
    """Of gathered keys and values, written and read, for all that a table has room for; and of scores."""
    b, rows, keys = _sizes(operands)
    pages, room = operands["key_pages"], keys / held_share(b)
    gathered = b * room * hint(pages.shape[1]) * sum(_row_sizes(operands)) * pages.element_size()
    return float(2.0 * gathered + 32.0 * rows * room)


def _contents(operands: Operands) -> Operands:
    """Pages in shuffled order, each once as long as there are enough, and requests of all lengths."""
    table, pages = operands["page_table"], operands["key_pages"]
    b, room = table.shape[0], table.shape[1] * pages.shape[2]
    order = torch.randperm(max(1, pages.shape[0]), generator=torch.Generator().manual_seed(0))
    filled = order[torch.arange(table.numel()) % len(order)].view(table.shape)
    lengths = (room * torch.arange(1, b + 1) + b - 1) // max(1, b)
    told = {"page_table": filled, "lengths": lengths}
    return {**operands, **{name: x.to(operands[name]) for name, x in told.items()}}


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for h, hkv, t, page, room, lengths, d, dv in (
        (2, 2, 1, 1, 5, [0, 1, 5], 16, 16),
        (4, 2, 1, 16, 4, [63, 17, 0, 64], 32, 32),
        (3, 1, 4, 7, 9, [2, 63, 30], 8, 5),
    ):
        b, pages = len(lengths), 2 * room
        q = torch.randn(b, h, t, d, dtype=dtype, device=device)
        k = torch.randn(pages, hkv, page, d, dtype=dtype, device=device)
        v = torch.randn(pages, hkv, page, dv, dtype=dtype, device=device)
        table = torch.randint(pages, (b, room), device=device, dtype=torch.int32)
        held = torch.tensor(lengths, device=device, dtype=torch.int32)
        yield Sample((q, k, v, table, held), {"scale": d**-0.5})
        yield Sample((q, k, v, table.long(), held.long()), {"scale": 0.5, "softcap": 3.0})


def call_problem(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, lengths: Tensor
) -> str | None:
    """Why these are not the operands of a call, or None. Adds no guard on symbols."""
    ranks = [x.dim() for x in (query, key_pages, value_pages, page_table, lengths)]
    if ranks != [4, 4, 4, 2, 1]:
        return f"operands have {ranks} dimensions, and the op wants 4, 4, 4, 2 and 1"
    dtypes = {x.dtype for x in (query, key_pages, value_pages)}
    if len(dtypes) > 1 or not query.is_floating_point():
        names = ", ".join(sorted(map(str, dtypes)))
        return f"query and pages are {names}, and the op wants one floating dtype"
    for name, x in (("page_table", page_table), ("lengths", lengths)):
        if x.dtype not in (torch.int32, torch.int64):
            return f"{name} is {x.dtype}, and the op wants int32 or int64"
    (b, h, _, d), (pages, hkv, page, _) = query.shape, key_pages.shape
    pairs = [(d, key_pages.shape[3]), (b, page_table.shape[0]), (b, lengths.shape[0])]
    pairs += list(zip(key_pages.shape[:3], value_pages.shape[:3], strict=True))
    differ = any(statically_known_true(x != y) for x, y in pairs)
    empty = any(statically_known_true(n == 0) for n in (pages, hkv, page, page_table.shape[1]))
    if differ or empty or statically_known_true(h % hkv != 0):
        shapes = ", ".join(f"{list(x.shape)}" for x in (query, key_pages, value_pages, page_table, lengths))
        wanted = "[b, h, t, d], [pages, hkv, page, d], [pages, hkv, page, dv], [b, pages of a request], [b]"
        return f"operands are {shapes}, and the op wants {wanted}, at least one page, h a multiple of hkv"
    return None


def check_call(*operands: Tensor) -> None:
    """Raise ValueError if operands, in the op's order, do not fit together."""
    problem = call_problem(*operands)
    if problem is not None:
        raise ValueError(f"paged_attention: {problem}")


def gathered(pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """`[b, hkv, room, d]`: what requests hold, in order, and 0 beyond a length. Other pages are not read."""
    page = pages.shape[2]
    starts = torch.arange(table.shape[1], device=pages.device) * page
    table = torch.where(starts < lengths.unsqueeze(1), table, 0)
    # A page below 0 is none; compiled code would take one from the end.
    table = torch.where(table < 0, pages.shape[0], table)
    by_request = (
        pages.index_select(0, table.flatten()).unflatten(0, table.shape).transpose(1, 2).flatten(2, 3)
    )
    places = torch.arange(by_request.shape[2], device=pages.device)
    held = (places < lengths.unsqueeze(1))[:, None, :, None]
    return torch.where(held, by_request, 0.0)


def rows_seen(lengths: Tensor, t: int, room: int) -> Tensor:
    """`[b, 1, t, room]`: the keys that each of the last `t` rows sees."""
    rows = lengths.unsqueeze(1) - t + torch.arange(t, device=lengths.device)
    return (torch.arange(room, device=lengths.device) <= rows.unsqueeze(-1)).unsqueeze(1)


def _fake(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, lengths: Tensor, **_: Any
) -> Tensor:
    check_call(query, key_pages, value_pages, page_table, lengths)
    return query.new_empty((*query.shape[:-1], value_pages.shape[-1]))


@op(
    flops=_flops,
    samples=_samples,
    fake=_fake,
    reference_bytes=_reference_bytes,
    least_bytes=_least_bytes,
    contents=_contents,
)
def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the last `t` tokens of each request, causal, over the keys in its pages.

    Args:
        query: `[b, h, t, d]`: a decode step has `t` of 1; more are the tail of a prompt, or drafted tokens.
        key_pages: `[pages, hkv, page, d]` of any strides, `h` a multiple of `hkv`: query head i reads KV head
            `i // (h / hkv)`. A pool `[pages, page, hkv, d]` is given as its `transpose(1, 2)`.
        value_pages: `[pages, hkv, page, dv]`.
        page_table: int32 or int64 `[b, pages of a request]`. Key j of request b lies in page
            `page_table[b, j // page]` at `j % page`. Entries beyond a length are not read, and may hold
            anything; the others are in `[0, pages)`.
        lengths: int32 or int64 `[b]`: keys of each request, those of its queries included. What goes beyond
            the table is not there.
        scale: multiplies the scores before everything else.
        softcap: `c * tanh(scores / c)` if nonzero.

    Returns:
        `[b, h, t, dv]`, contiguous, dtype of `query`. A row without a key, of a request of length 0 or one
        shorter than `t`, gives 0. Nothing beyond a length has a part in it, NaN included. The softmax
        accumulates in float32 or wider.

    Raises:
        ValueError: the operands do not fit together.
    """
    check_call(query, key_pages, value_pages, page_table, lengths)
    key, value = (gathered(x, page_table, lengths) for x in (key_pages, value_pages))
    seen = rows_seen(lengths, query.shape[2], key.shape[2])
    settings: dict[str, Any] = {"scale": scale, "softcap": softcap, "zero_masked_rows": True}
    return attention.reference(query, key, value, mask=seen, **settings).contiguous()
