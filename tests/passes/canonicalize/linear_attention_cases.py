"""Linear attention as models spell it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

T = 70


def apart(t: int, dtype: torch.dtype = torch.int64) -> Tensor:
    place = torch.arange(t, dtype=dtype)
    return place[:, None] - place


def triangle(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * torch.ones(q.shape[2], q.shape[2]).tril()) @ v


def boolean(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(apart(q.shape[2]) < 0, 0.0) @ v


def retention(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    back = apart(q.shape[2], torch.float32)
    decay = torch.where(back >= 0, torch.exp(-rate.abs()[:, None, None] * back), 0.0)
    return (q @ k.mT * q.shape[-1] ** -0.5 * decay) @ v


def masked_logarithm(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    back = apart(q.shape[2])
    log = (rate[:, None, None] * back).masked_fill(back < 0, -torch.inf)
    return (torch.einsum("bhid,bhjd->bhij", q, k) * log.exp()) @ v


def learned_base(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    powers = rate.sigmoid().view(1, -1, 1, 1) ** apart(q.shape[2]).clamp(min=0)
    return (q @ k.mT * powers).tril() @ v


def one_base(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * (0.97 ** apart(q.shape[2]).abs().float()).tril()) @ v


def normalised(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    q, k = (nn.functional.elu(x) + 1 for x in (q, k))
    weights = (q @ k.mT).tril()
    return (weights @ v) / weights.sum(-1, keepdim=True).clamp(min=1e-6)


def cumulative(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    q, k = (nn.functional.elu(x) + 1 for x in (q, k))
    states = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    out = torch.einsum("bhtd,bhtde->bhte", q, states)
    return out / ((q * k.cumsum(2)).sum(-1, keepdim=True) + 1e-6)


def cumulative_rows(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    states = torch.cumsum(k[..., :, None] * v[..., None, :], dim=2)
    return (q[..., None, :] @ states).squeeze(-2)


SPELLINGS = {
    f.__name__: f
    for f in (triangle, boolean, retention, masked_logarithm, learned_base, one_base, normalised, cumulative,
              cumulative_rows)
}  # fmt: skip


BUFFERS = {
    "float": (torch.ones(T, T).tril(), lambda scores, mask: scores * mask),
    "float, compared": (
        torch.ones(1, 1, T, T).tril(),
        lambda scores, mask: scores.masked_fill(mask == 0, 0.0),
    ),
    "bool": (torch.ones(T, T).tril().bool(), lambda scores, mask: scores.masked_fill(~mask, 0.0)),
    "bool, a factor": (torch.ones(T, T).tril().bool(), lambda scores, mask: scores * mask.to(scores.dtype)),
    "bool, of what is hidden": (torch.ones(T, T).triu(1).bool(), lambda x, mask: x.masked_fill(mask, 0.0)),
    "bytes": (torch.ones(T, T).tril().byte(), lambda scores, mask: scores.masked_fill(mask == 0, 0.0)),
    "bytes, as truths": (torch.ones(T, T).tril().byte(), lambda x, mask: x.where(mask.bool(), 0.0)),
}


class Held(nn.Module):
    """Attends by a mask in a registered buffer, longer than the sequence."""

    def __init__(self, mask: Tensor, use: Any) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.use = use

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Any:
        t, mask = q.shape[2], self.mask
        assert isinstance(mask, Tensor)
        return self.use(q @ k.mT, mask[..., :t, :t]) @ v


class Layer(nn.Module):
    def __init__(self, attend: Any, heads: int = 3, size: int = 8) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.qkv = nn.Linear(size, 3 * heads * size)
        self.rate = nn.Parameter(-torch.rand(heads))

    def forward(self, x: Tensor) -> Tensor:
        b, t, size = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v, self.rate).transpose(1, 2).reshape(b, t, -1)


def recognised(report: Any) -> int:
    return report.counts["recognize-linear-attention"] + report.counts["recognize-cumulative-attention"]
