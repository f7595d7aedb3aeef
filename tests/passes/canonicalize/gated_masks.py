"""Gates of tokens in a mask, as models spell them: of query, key, value, gates `[b, h, t]` and steps dt."""

from __future__ import annotations

import torch
from torch import Tensor


def apart(t: int) -> Tensor:
    place = torch.arange(t)
    return place[:, None] - place


def differences(g: Tensor) -> Tensor:
    total = g.cumsum(-1)
    return total[..., :, None] - total[..., None, :]


def segment_sum(g: Tensor, diagonal: int = -1) -> Tensor:
    """As `transformers` spells it."""
    t = g.size(-1)
    g = g[..., None].expand(*g.size(), t)
    below = torch.tril(torch.ones(t, t, dtype=torch.bool), diagonal=diagonal)
    total = torch.cumsum(g.masked_fill(~below, 0), dim=-2)
    return total.masked_fill(~torch.tril(torch.ones(t, t, dtype=torch.bool)), -torch.inf)


def filled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    return (q @ k.mT * differences(g).masked_fill(apart(q.shape[2]) < 0, -torch.inf).exp()) @ v


def selected(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    decay = torch.exp(differences(g))
    return (q @ k.mT * q.shape[-1] ** -0.5 * torch.where(apart(q.shape[2]) >= 0, decay, 0.0)) @ v


def triangle(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    total = g.cumsum(-1)
    return (q @ k.mT * torch.exp(-(total[..., None, :] - total[..., :, None]))).tril() @ v


def segments(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    return (q @ k.mT * segment_sum(g).exp()) @ v


def segments_below(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    """No -inf: what is ahead of the diagonal is 1 before a product makes it 0."""
    t = q.shape[2]
    total = g[..., None].expand(*g.shape, t).tril(-1).cumsum(-2)
    return (q @ k.mT * (total.exp() * (apart(t) >= 0))) @ v


def steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    """Values scaled by the step of their token, as in a state-space model."""
    return (q @ k.mT * segment_sum(g * dt).exp() * dt[..., None, :]) @ v


def one_key(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    scores = torch.einsum("btn,bsn->bts", q[:, 0], k[:, 0])
    return (scores[:, None] * segment_sum(g).exp()) @ v


def groups(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    scores = (q[:, :2] @ k[:, :2].mT).repeat_interleave(2, dim=1)
    return (scores * segment_sum(g).exp()) @ v


def tokens_first(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("blhn,bshn->blsh", q, k) * segment_sum(g).exp().permute(0, 2, 3, 1)
    return torch.einsum("blsh,bshp->blhp", weights, v).transpose(1, 2)


def with_rate(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    decay = torch.exp(-0.1 * apart(q.shape[2])) * differences(g).exp()
    return (q @ k.mT * decay).tril() @ v


def normalised(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor) -> Tensor:
    weights = q @ k.mT * segment_sum(g).exp() * dt[..., None, :]
    return weights @ v / weights.sum(-1, keepdim=True).abs().clamp(min=1.0)


SPELLINGS = {
    f.__name__: f
    for f in (filled, selected, triangle, segments, segments_below, steps, one_key, groups, tokens_first,
              with_rate, normalised)
}  # fmt: skip


def inputs(t: int = 21, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Query, key, value, gates below 0 and steps above it."""
    q, k, v = (torch.randn(2, 4, t, n, dtype=dtype) for n in (6, 6, 5))
    return q, k, v, -torch.rand(2, 4, t, dtype=dtype), torch.rand(2, 4, t, dtype=dtype)
