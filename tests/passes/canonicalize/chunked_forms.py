"""Linear attention in chunks, as models spell it: of C, B, X, gates `[b, t, h]`, a state `[b, h, p, n]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.passes.canonicalize.gated_masks import segment_sum


def chunks(x: Tensor, size: int) -> Tensor:
    """`[b, t, ..]` padded to whole chunks, `[b, c, l, ..]`."""
    more = -x.shape[1] % size
    x = pad(x, (0, 0) * (x.dim() - 2) + (0, more))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def start_of(states: Tensor, initial: Tensor | None) -> Tensor:
    return torch.zeros_like(states[:, :1]) if initial is None else initial[:, None]


@dataclass(frozen=True)
class Spelled:
    """The chunked form as `transformers` writes it; each part may be exchanged, for look-alikes."""

    size: int = 8
    pairs: Callable[[Tensor], Tensor] = lambda g: segment_sum(g).exp()
    decay_to_end: Callable[[Tensor], Tensor] = lambda total: torch.exp(total[..., -1:] - total)
    carried: Callable[[Tensor], Tensor] = lambda total: segment_sum(pad(total[..., -1], (1, 0))).exp()
    decay_from_start: Callable[[Tensor, Tensor], Tensor] = lambda total, g: total.exp()
    total: Callable[[Tensor], Tensor] = lambda g: g.cumsum(-1)
    before: Callable[[Tensor], Tensor] = lambda states: states[:, :-1]
    last: Callable[[Tensor], Any] = lambda states: states[:, -1]
    reads: Callable[[Tensor], Tensor] = lambda c: c
    kept: Callable[[Tensor], Tensor] = lambda x: x
    weights: Callable[[Tensor], Tensor] = lambda m: m

    def __call__(self, c: Tensor, b: Tensor, x: Tensor, g: Tensor, initial: Tensor | None = None) -> Any:
        t = x.shape[1]
        c, b, x, g = (chunks(y, self.size) for y in (c, b, x, g))
        g = g.permute(0, 3, 1, 2)
        total = self.total(g)
        scores = torch.einsum("bclhn,bcshn->bclsh", c, b)
        weights = self.weights(scores * self.pairs(g).permute(0, 2, 3, 4, 1))
        pairs = torch.einsum("bclsh,bcshp->bclhp", weights, x)
        decayed = b * self.decay_to_end(total).permute(0, -2, -1, 1)[..., None]
        alone = torch.einsum("bclhn,bclhp->bchpn", decayed, self.kept(x))
        alone = torch.cat([start_of(alone, initial), alone], dim=1)
        states = torch.einsum("bzch,bzhpn->bchpn", self.carried(total).transpose(1, 3), alone)
        read = torch.einsum("bclhn,bchpn->bclhp", self.reads(c), self.before(states))
        read = read * self.decay_from_start(total, g).permute(0, 2, 3, 1)[..., None]
        out = (pairs + read).contiguous().reshape(x.shape[0], -1, *x.shape[3:])
        return out[:, :t], self.last(states)


def broadcast(
    c: Tensor, b: Tensor, x: Tensor, g: Tensor, initial: Tensor | None = None, size: int = 8
) -> Any:
    """As older versions of `transformers` write it, with products of up to six dimensions."""
    t = x.shape[1]
    c, b, x, g = (chunks(y, size) for y in (c, b, x, g))
    g = g.permute(0, 3, 1, 2)
    total = torch.cumsum(g, dim=-1)
    scores = (c[:, :, :, None, :, :] * b[:, :, None, :, :, :]).sum(dim=-1)
    weights = (scores[..., None] * segment_sum(g).exp().permute(0, 2, 3, 4, 1)[..., None]).sum(dim=-1)
    pairs = (weights[..., None] * x[:, :, None]).sum(dim=3)
    decayed = b * torch.exp(total[:, :, :, -1:] - total).permute(0, -2, -1, 1)[..., None]
    alone = (decayed[..., None, :] * x[..., None]).sum(dim=2)
    alone = torch.cat([start_of(alone, initial), alone], dim=1)
    carried = segment_sum(pad(total[:, :, :, -1], (1, 0))).exp().transpose(1, 3)
    states = (carried[..., None, None] * alone[:, :, None, ...]).sum(dim=1)
    read = (c[..., None, :] * states[:, :-1][:, :, None, ...]).sum(-1)
    read = read * torch.exp(total).permute(0, 2, 3, 1)[..., None]
    return (pairs + read).reshape(x.shape[0], -1, *x.shape[3:])[:, :t], states[:, -1]


def listing(c: Tensor, b: Tensor, x: Tensor, g: Tensor, initial: Tensor | None = None, size: int = 8) -> Any:
    """After listing 1 of the paper: products of up to four tensors; dt scales values and gates."""
    t = x.shape[1]
    dt = -g
    c, b, x, dt = (chunks(y, size) for y in (c, b, x, dt))
    g = (-0.5 * dt).permute(0, 3, 1, 2)
    x = x * dt[..., None]
    total = torch.cumsum(g, dim=-1)
    between = torch.exp(segment_sum(g))
    pairs = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, between, x)
    alone = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, torch.exp(total[..., -1:] - total), x)
    alone = torch.cat([start_of(alone, initial), alone], dim=1)
    carried = torch.exp(segment_sum(pad(total[..., -1], (1, 0))))
    states = torch.einsum("bhzc,bchpn->bzhpn", carried, alone)
    read = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states[:, :-1], torch.exp(total))
    return (pairs + read).flatten(1, 2)[:, :t], states[:, -1]


def heads_first(
    c: Tensor, b: Tensor, x: Tensor, g: Tensor, initial: Tensor | None = None, size: int = 8
) -> Any:
    """By matmuls over `[b, h, c, l, ..]`; differences of a cumulative sum instead of segment sums."""
    t, more = x.shape[1], -x.shape[1] % size
    c, b, x, g = (pad(y.transpose(1, 2), (0, 0) * (y.dim() - 3) + (0, more)) for y in (c, b, x, g))
    c, b, x, g = (y.unflatten(2, (-1, size)) for y in (c, b, x, g))
    total = g.cumsum(-1)
    ahead = torch.ones(size, size, dtype=torch.bool).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(ahead, -torch.inf).exp()
    pairs = (c @ b.mT * decay) @ x
    alone = (b * (total[..., -1:] - total).exp()[..., None]).mT @ x
    first = torch.zeros_like(alone[:, :, :1]) if initial is None else initial.mT[:, :, None]
    alone = torch.cat([first, alone], 2)
    carried = segment_sum(pad(total[..., -1], (1, 0))).exp()
    states = torch.einsum("bhcz,bhznp->bhcnp", carried, alone)
    out = pairs + (c @ states[:, :, :-1]) * total.exp()[..., None]
    return out.flatten(2, 3)[:, :, :t].transpose(1, 2), states[:, :, -1].mT


SPELLINGS: dict[str, Callable[..., Any]] = {
    "transformers": Spelled(), "broadcast": broadcast, "listing": listing, "heads first": heads_first
}  # fmt: skip


def inputs(
    t: int = 21, b: int = 2, h: int = 3, p: int = 5, n: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """C, B, X, gates below 0, and a state."""
    c, k = (torch.randn(b, t, h, n, dtype=dtype) for _ in range(2))
    x, initial = torch.randn(b, t, h, p, dtype=dtype), torch.randn(b, h, p, n, dtype=dtype)
    return c, k, x, -torch.rand(b, t, h, dtype=dtype), initial


def step_by_step(c: Tensor, b: Tensor, x: Tensor, g: Tensor, initial: Tensor | None = None) -> Any:
    """The recurrence, token by token."""
    state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1]) if initial is None else initial
    out = []
    for i in range(x.shape[1]):
        state = g[:, i, :, None, None].exp() * state + x[:, i, ..., None] * b[:, i, :, None]
        out.append((state * c[:, i, :, None]).sum(-1))
    return torch.stack(out, 1), state
