"""The tokens of linear attention in chunks, and what decay leaves of them within one.

Logarithms of decay are summed and never subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK, CHANNEL_CHUNK = 64, 16
"""Tokens of a chunk: about d, where products inside it cost what the state does. With gates a channel each
pair takes an exponential a channel, so the chunk is shorter."""


@dataclass(frozen=True)
class Chunks:
    """One call, its tokens in chunks: `[n, c, C, ...]`, n batch entries times heads, padded with zeros.

    A padding token has key 0 and decay 0 (it keeps all), and so leaves the state as it is.
    """

    query: Tensor
    """Scaled."""
    key: Tensor
    value: Tensor
    decay: Tensor | None
    """`[n, c, C, e]`, e is 1 or d."""
    state: Tensor
    """`[n, d, dv]`, before the first token."""

    @property
    def by_channel(self) -> bool:
        """Whether channels decay differently."""
        return self.decay is not None and self.decay.shape[-1] > 1

    def later(self) -> Tensor:
        """Decay of the tokens m behind token j, `[n, c, C (m), C (j), 1]`; not for decay by channel."""
        assert self.decay is not None
        place = torch.arange(self.query.shape[2], device=self.query.device)
        return torch.where((place.unsqueeze(-1) > place).unsqueeze(-1), self.decay.unsqueeze(-2), 0.0)

    def since_start(self) -> Tensor:
        """What is left at each token of the state before the chunk, `[n, c, C, e]` (or 1)."""
        return self.query.new_ones(()) if self.decay is None else self.decay.cumsum(2).exp()

    def until_end(self) -> Tensor:
        """What is left of each token at the end of the chunk, likewise."""
        if self.decay is None:
            return self.query.new_ones(())
        behind = F.pad(self.decay[:, :, 1:], (0, 0, 0, 1))
        return behind.flip(2).cumsum(2).flip(2).exp()

    def kept(self) -> Tensor | None:
        """What is left of a state after each chunk, `[n, c, e, 1]`."""
        return None if self.decay is None else self.decay.sum(2).exp().unsqueeze(-1)

    def from_key(self, j: int) -> Tensor:
        """What is left of token j at tokens j, j + 1, ..., `[n, c, C - j, d]`."""
        assert self.decay is not None
        return F.pad(self.decay[:, :, j + 1 :].cumsum(2), (0, 0, 1, 0)).exp()


def cut(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """`[b, h, t, e]` as `[b h, c, C, e]`."""
    b, h, t, e = x.shape
    count = -(-t // chunk)
    padded = F.pad(x.to(dtype), (0, 0, 0, count * chunk - t))
    return padded.reshape(b * h, count, chunk, e)


def joined(x: Tensor, like: Tensor) -> Tensor:
    """`[b h, c, C, e]` as `[b, h, t, e]` of `like`, without the padding."""
    b, h, t = like.shape[:3]
    return x.reshape(b, h, -1, x.shape[-1])[:, :, :t].to(like.dtype).contiguous()


def chunks(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, state: Tensor | None, scale: float
) -> Chunks:
    """A call of `ops.linear_attention`; arguments as there."""
    b, h, t, d = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    by_channel = decay is not None and decay.dim() == 4 and d > 1
    chunk = min(max(t, 1), CHANNEL_CHUNK if by_channel else CHUNK)
    if decay is not None:
        steps = decay.view(1, h, 1).expand(b, h, t) if decay.dim() == 1 else decay
        decay = cut(steps if steps.dim() == 4 else steps.unsqueeze(-1), chunk, wide)
    q, k, v = (cut(x, chunk, wide) for x in (query, key, value))
    sizes = (b * h, d, value.shape[-1])
    past = q.new_zeros(sizes) if state is None else state.to(wide).reshape(sizes)
    return Chunks(q * scale, k, v, decay, past)
