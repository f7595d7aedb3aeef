"""Loops over time that only look like linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.passes.canonicalize.test_recognize_recurrent_attention import Body, T, looped


def gated(s: Tensor, kv: Tensor, g: Tensor, t: int) -> Tensor:
    return s * g[:, :, t, :, None].sigmoid() + kv


def keeping(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> list[Tensor]:
    kept, out = [], []
    for t in range(T):
        s = gated(s, k[:, :, t, :, None] * v[:, :, t, None], g, t)
        kept.append(s)
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return [torch.stack(out, 2), kept[1]]


def constants(gamma: Tensor, *given: Tensor) -> Any:
    return looped(lambda s, kv, g, t: s * gamma[:, None, None] + kv)(*given)


def flat(update: Body) -> Body:
    """A loop of matrices without batch entries, by what a step makes of its state, key, value and gate."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
        q, k, v, g, s = (x.flatten(0, 1) for x in (q, k, v, g, s))
        out = []
        for t in range(T):
            s = update(s, k[:, t, :, None], v[:, t, None], g[:, t, :, None])
            out.append(torch.bmm(q[:, t, None], s))
        return torch.cat(out, 1)

    return loop


def all_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    s, out = torch.zeros_like(s[0, 0]), []
    for t in range(T):
        s = torch.addbmm(s, k[0, :, t, :, None], v[0, :, t, None])
        out.append(q[0, 0, t] @ s)
    return torch.stack(out)


def running_maximum(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """As RWKV-4 and xLSTM keep exponentials from overflowing."""
    top, out = torch.zeros_like(g[:, :, 0]), []
    for t in range(T):
        higher = torch.maximum(top - 0.5, g[:, :, t])
        s = s * (top - higher).exp()[..., None] + k[:, :, t, :, None] * v[:, :, t, None]
        top = higher
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2)


def before_and_after(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    out = []
    for t in range(T):
        old, s = s, gated(s, k[:, :, t, :, None] * v[:, :, t, None], g, t)
        out.append((q[:, :, t, :, None] * (s + old)).sum(-2))
    return torch.stack(out, 2)


def early(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, bonus: Body, keeps: bool = False) -> Any:
    """The last step reads, and does not update."""
    out = []
    for t in range(T):
        kv = k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * (s + bonus(kv, k[:, :, t]))).sum(-2))
        s = gated(s, kv, g, t) if t < T - 1 else s
    return [torch.stack(out, 2), s] if keeps else torch.stack(out, 2)


def later_gates(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    later = g[:, :, 1:].sigmoid()
    return looped(lambda s, kv, _, t: s * later[:, :, t - 1, :, None] + kv if t else kv)(q, k, v, g, s)


def summed_and_kept(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> list[Tensor]:
    """What hands the decayed state on is returned too."""
    kept, out = [], []
    for t in range(T):
        kept.append(s * g[:, :, t, :, None].sigmoid() + 0)
        s = kept[-1] + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return [torch.stack(out, 2), kept[2]]


def copied_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """As the recurrent form of DeltaNet is published: each read of the state is of a copy."""
    s, out = torch.zeros_like(s), torch.zeros_like(v)
    for t in range(T):
        key = k[:, :, t, :, None]
        new = (v[:, :, t] - (s.clone() * key).sum(-2)) * g[:, :, t, :1].sigmoid()
        s = s.clone() + key * new.unsqueeze(-2)
        out[:, :, t] = torch.einsum("bhd,bhdm->bhm", q[:, :, t], s)
    return out


def turned_by_a_matrix(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """A delta rule as a product of matrices."""
    out = []
    for t in range(T):
        key = k[:, :, t, :, None]
        s = (torch.eye(key.shape[2]) - 0.1 * key * key.mT) @ s + 0.1 * key * v[:, :, t, None]
        out.append(q[:, :, t, None] @ s)
    return torch.cat(out, 2)


def turned_and_kept(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """As RWKV-7 has it: a decay, and a matrix of rank 1."""
    out = []
    for t in range(T):
        key, gate = k[:, :, t, :, None], g[:, :, t, :, None].sigmoid()
        s = s * gate - 0.1 * key @ (key.mT @ s) + key @ v[:, :, t, None]
        out.append(q[:, :, t, None] @ s)
    return torch.cat(out, 2)


def over_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> list[Tensor]:
    """As the chunkwise form of RetNet is published; its last token is a chunk of its own, and left out."""
    place, out = torch.arange(2), []
    decay = torch.where(place[:, None] >= place, 0.9 ** (place[:, None] - place), 0.0)
    for i in range(0, T - 1, 2):
        a, b, c = (x[:, :, i : i + 2] for x in (q, k, v))
        left = (0.9 ** (place + 1.0))[:, None]
        out.append((a @ b.mT * decay) @ c + a * left @ s)
        s = s * 0.9**2 + (b * (0.9 ** (1.0 - place))[:, None]).mT @ c
    return [torch.cat(out, 2), s]


def over_split_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    q, k, v = (x[:, :, :4].unflatten(2, (2, 2)) for x in (q, k, v))
    out = []
    for i in range(2):
        s = s * 0.5 + k[:, :, i].mT @ v[:, :, i]
        out.append(q[:, :, i] @ s)
    return torch.stack(out, 2)


def vector_gates(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, read: Body = lambda z, q: (q * z).sum(-1)
) -> Tensor:
    z, out = s[..., 0], []
    for t in range(T):
        z = z * g[:, :, t].sigmoid() + k[:, :, t]
        out.append(read(z, q[:, :, t]))
    return torch.stack(out, 2)
