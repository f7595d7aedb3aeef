"""Linear attention in chunks of tokens: products inside a chunk, one state carried from chunk to chunk.

    out   = (query key^T * decay between them, causal) value + (query * decay since the chunk began) state
    state = decay of the chunk * state + (key * decay until the chunk ends)^T value

O(t) time and memory instead of O(t^2). The chunks are taken together, and only the states, which depend on
each other, one by one. Logarithms of decay are summed and never subtracted, so that a strong decay neither
overflows nor takes the digits of a weak one. The backward pass carries the gradient of the state from the
last chunk to the first; it saves the operands and computes the states again. PyTorch alone, on any device.

Source: Qin et al. 2024, arXiv:2401.04658, algorithms 1 and 2; gates a channel: Yang et al. 2023,
arXiv:2312.06635, sections 4.2 and 4.3 (the chunk within which pairs are taken in logarithms).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.backends.base import Lowering
from effopt.backends.token_chunks import CHANNEL_CHUNK, CHUNK, Chunks, chunks, cut, joined
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint
from effopt.graph.ops.linear_attention import causal_product
from effopt.target import Target

_STATE_S = 1.5e-5
"""Seconds that carrying a state over one chunk takes beside its arithmetic: two calls."""
_CALL_S = 2e-4
"""And a call, which is not fused with its neighbours."""


def _weights(c: Chunks) -> Tensor:
    """Weight of each key of a chunk for each of its queries, `[n, c, C, C]`, 0 ahead of the query."""
    if not c.by_channel:
        product = c.query @ c.key.mT
        return (product if c.decay is None else product * c.later().cumsum(2).squeeze(-1).exp()).tril()
    found = c.query.new_zeros((*c.query.shape[:3], c.query.shape[2]))
    for j in range(c.query.shape[2]):
        line = (c.query[:, :, j:] * c.from_key(j)) @ c.key[:, :, j].unsqueeze(-1)
        found[:, :, j:, j] = line.squeeze(-1)
    return found


def _carried(first: Tensor, kept: Tensor | None, added: Tensor) -> Iterator[Tensor]:
    """States before each chunk, and the one after the last."""
    state = first
    yield state
    for i in range(added.shape[1]):
        state = added[:, i] + (state if kept is None else kept[:, i] * state)
        yield state


def _states(c: Chunks) -> tuple[Tensor, Tensor]:
    """Before each chunk `[n, c, d, dv]`, and after the last `[n, d, dv]`."""
    added = (c.key * c.until_end()).mT @ c.value
    *before, last = _carried(c.state, c.kept(), added)
    return torch.stack(before, 1) if before else added, last


def _weighed(c: Chunks) -> Tensor:
    """What the tokens of a chunk give each other, `[n, c, C, dv]`."""
    # A sum tells whether all are finite, for one pass; on a GPU, asking would wait for the device.
    if c.value.device.type == "cpu" and bool(c.value.sum().isfinite()):
        return _weights(c) @ c.value
    return causal_product(_weights(c), c.value)


def forward(c: Chunks) -> tuple[Tensor, Tensor]:
    """Result `[n, c, C, dv]`, and the last state."""
    before, last = _states(c)
    return _weighed(c) + (c.query * c.since_start()) @ before, last


def backward(c: Chunks, grad: Tensor, grad_last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (scaled query, key, value, decay, first state), in the shapes of `Chunks`.

    Args:
        c: the call.
        grad: of the result, `[n, c, C, dv]`.
        grad_last: of the last state, `[n, d, dv]`.
    """
    before, _ = _states(c)
    start, end, kept = c.since_start(), c.until_end(), c.kept()
    added = (c.query * start).mT @ grad
    reverse = None if kept is None else kept.flip(1)
    *after, first = _carried(grad_last, reverse, added.flip(1))
    behind = torch.stack(after[::-1], 1) if after else added
    query, key = grad @ before.mT * start, c.value @ behind.mT * end
    value = _weights(c).mT @ grad + (c.key * end) @ behind
    decay = c.query.new_zeros(1)
    if kept is not None:
        # A token's decay shrinks the state for itself and later queries, earlier keys at the chunk's end, and
        # the state that goes through.
        of_query, of_key, through = query * c.query, key * c.key, kept * before * behind
        decay = of_query.flip(2).cumsum(2).flip(2) + F.pad(of_key.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
        decay = decay + through.sum(-1).unsqueeze(2)
        decay = decay if c.by_channel else decay.sum(-1, keepdim=True)
    inner = _inner_by_channel(c, grad) if c.by_channel else _inner(c, grad)
    return query + inner[0], key + inner[1], value, decay + inner[2], first


def _inner(c: Chunks, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What pairs inside a chunk give to the gradients of (query, key, decay)."""
    pairs = (grad @ c.value.mT).tril()
    decay = pairs.new_zeros(1)
    if c.decay is not None:
        pairs = pairs * c.later().cumsum(2).squeeze(-1).exp()
        # Token m shrinks all pairs of a key before it and a query at it or later.
        across = (pairs * (c.query @ c.key.mT)).tril(-1)
        decay = across.flip(2).cumsum(2).flip(2).tril(-1).sum(-1, keepdim=True)
    return pairs @ c.key, pairs.mT @ c.query, decay


def _inner_by_channel(c: Chunks, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where channels decay differently, key by key."""
    pairs = (grad @ c.value.mT).tril()
    query, key, decay = (torch.zeros_like(c.query) for _ in range(3))
    for j in range(c.query.shape[2]):
        left = c.from_key(j) * pairs[:, :, j:, j].unsqueeze(-1)
        by_key = left * c.query[:, :, j:]
        query[:, :, j:] += left * c.key[:, :, j : j + 1]
        key[:, :, j] += by_key.sum(2)
        across = (by_key * c.key[:, :, j : j + 1])[:, :, 1:]
        decay[:, :, j + 1 :] += across.flip(2).cumsum(2).flip(2)
    return query, key, decay


_SCHEMA = "Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? state, float scale"


@torch.library.custom_op(
    "effopt_chunked::linear_attention", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)"
)
def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    query = given[0]
    out, last = forward(chunks(*given))
    return joined(out, query), last.reshape(*query.shape[:2], *last.shape[1:]).clone()


@torch.library.custom_op(
    "effopt_chunked::linear_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_last, {_SCHEMA}) -> Tensor[]",
)
def _backward(grad: Tensor, grad_last: Tensor, *given: Any) -> list[Tensor]:
    query, key, value, decay, state, scale = given
    c = chunks(*given)
    wide = c.query.dtype
    upstream = cut(grad, c.query.shape[2], wide)
    *made, of_decay, first = backward(c, upstream, grad_last.to(wide).reshape(c.state.shape))
    made[0] = made[0] * scale
    found = [joined(m, x) for m, x in zip(made, (query, key, value), strict=True)]
    if decay is None:
        found.append(grad.new_zeros(0))
    else:
        steps = joined(of_decay, query.new_empty((*query.shape[:3], 1), dtype=wide))
        found.append(_of_decay(steps, decay))
    found.append(grad.new_zeros(0) if state is None else first.reshape(state.shape).to(state.dtype).clone())
    return found


def _of_decay(steps: Tensor, decay: Tensor) -> Tensor:
    """The gradient `[b, h, t, e]` in the shape of a decay."""
    if decay.dim() == 1:
        steps = steps.sum((0, 2, 3))
    return steps.reshape(decay.shape).to(decay.dtype).contiguous()


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return ops.linear_attention.fake(query, key, value)


@_backward.register_fake
def _(grad: Tensor, grad_last: Tensor, *given: Any) -> list[Tensor]:
    return [
        grad.new_zeros(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in given[:5]
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[5]


def _differentiate(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    made = _backward(grad, grad_last, *ctx.saved_tensors, ctx.scale)
    return *(g if n else None for g, n in zip(made, ctx.needs_input_grad[:5], strict=True)), None


_forward.register_autograd(_differentiate, setup_context=_save)


def chunked_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    decay: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.linear_attention` chunk by chunk; arguments as there."""
    return _forward(query, key, value, decay, state, scale)


def _supports(target: Target, operands: Operands) -> str | None:
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline of products inside chunks and of states, and a constant for each chunk."""
    query, decay = operands["query"], operands["decay"]
    b, h, t, d = map(hint, query.shape)
    dv = hint(operands["value"].shape[-1])
    by_channel = decay is not None and decay.dim() == 4
    chunk = CHANNEL_CHUNK if by_channel else CHUNK
    inside = 2.0 * chunk * (d + dv) + (20.0 * chunk * d if by_channel else 20.0 * chunk)
    work = b * h * t * (inside + 4.0 * d * dv)
    moved = 3.0 * ops.linear_attention.bytes_moved(operands, result)
    passing = -(-t // chunk) * _STATE_S
    return max(moved / target.bytes_per_s, work / target.flops_per_s) + passing + _CALL_S


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(ops.linear_attention, "chunked", chunked_linear_attention, _supports, _cost),
)
