"""Linear attention: attention without softmax, whose past is one matrix a head.

    state_i = exp(decay_i) * state_{i-1} + key_i^T value_i
    out_i   = scale * query_i @ state_i

which is, written over pairs of tokens,

    out_i   = scale * sum_{j <= i} (query_i . exp(decay_{j+1} + ... + decay_i) key_j) value_j

A normaliser `query_i . sum_{j <= i} key_j` (Katharopoulos, equation 12) is no part of the op: it is a linear
attention itself, whose values are ones, and what is done with it (an epsilon, a clamp) is elementwise.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, section 3.3; a decay a head: Sun et al. 2023,
arXiv:2307.08621, and Qin et al. 2024, arXiv:2401.04658, equation 4; gates a token: Dao & Gu
2024, arXiv:2405.21060, section 5; gates a channel: Yang et al. 2023, arXiv:2312.06635, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.ops.base import Operands, Sample, hint, op


def _fake(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    sizes = (*query.shape[:-2], query.shape[-1], value.shape[-1])
    return out, query.new_empty(sizes, dtype=torch.promote_types(query.dtype, torch.float32))


def _sizes(operands: Operands) -> tuple[int, int, int, int]:
    """Lines (batch entries times heads), t, d and dv, at the hints of symbolic sizes."""
    b, h, t, d = map(hint, operands["query"].shape)
    return b * h, t, d, hint(operands["value"].shape[-1])


def _flops(operands: Operands, _: Any) -> float:
    """Of tokens one by one: each adds a product to the state, and is multiplied by it."""
    lines, t, d, dv = _sizes(operands)
    return 4.0 * lines * t * d * dv


def _reference_bytes(operands: Operands, _: Any) -> float:
    """Of all pairs in float32: their products, the logarithms of their decays, and their weights."""
    lines, t, d, _ = _sizes(operands)
    decay = operands["decay"]
    by_channel = decay is not None and decay.dim() == 4
    passes = 8.0 if decay is None else 16.0
    return 4.0 * lines * t * t * (passes * d if by_channel else passes)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    for b, h, t, d, dv in ((1, 2, 1, 16, 16), (2, 3, 63, 8, 5), (1, 2, 100, 17, 32)):
        shapes = ((b, h, t, d), (b, h, t, d), (b, h, t, dv))
        q, k, v = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
        state = torch.randn(b, h, d, dv, dtype=torch.promote_types(dtype, torch.float32), device=device)
        head = -torch.arange(1.0, h + 1, dtype=dtype, device=device) / 16
        token = -torch.rand(b, h, t, dtype=dtype, device=device) * 2
        channel = -torch.rand(b, h, t, d, dtype=dtype, device=device)
        yield Sample((q, k, v), {"scale": d**-0.5})
        yield Sample((q, k, v), {"scale": 0.3, "decay": head})
        yield Sample((q, k, v), {"scale": 0.3, "decay": token, "state": state})
        yield Sample((q, k, v), {"scale": 0.3, "decay": channel, "state": state})


def _spans(decay: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of decay: from token j to token i `[.., t, t, e]`, to i from the start, from j to the end.

    Nothing is subtracted, so that a decay of -inf, which forgets all, gives no NaN, and strong decays do not
    take the digits of weak ones behind them. `e` is 1, or `d` for a decay of each channel.
    """
    place = torch.arange(t, device=decay.device)
    later = (place.unsqueeze(-1) > place).unsqueeze(-1)
    if decay.dim() == 1:
        rate = decay.view(-1, 1, 1)
        apart = (place.unsqueeze(-1) - place).unsqueeze(-1)
        between = torch.where(later, rate.unsqueeze(-1) * apart, 0.0)
        ahead = (t - 1 - place).unsqueeze(-1)
        return between, rate * (place + 1).unsqueeze(-1), torch.where(ahead > 0, rate * ahead, 0.0)
    steps = decay.unsqueeze(-1) if decay.dim() == 3 else decay
    apart = torch.where(later, steps.unsqueeze(-2), 0.0)
    return apart.cumsum(-3), steps.cumsum(-2), apart.sum(-3)


def causal_product(weights: Tensor, value: Tensor) -> Tensor:
    """`weights @ value` of weights `[.., t, t]` that are 0 ahead of the diagonal, in their dtype.

    There 0 * infinity is 0 too: a value that is not finite makes its row of the result and later ones NaN,
    and none before it. Their gradients are NaN as well, so that a loss which is one stays one.
    """
    if statically_known_true(value.shape[-2] == 1):
        return torch.matmul(weights, value)
    spoilt = (value.detach() * 0.0).cumsum(-2)
    return torch.matmul(weights, value.nan_to_num(0.0, 0.0, 0.0)) * (1.0 + spoilt)


@op(flops=_flops, samples=_samples, fake=_fake, reference_bytes=_reference_bytes)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    decay: Optional[Tensor] = None,
    state: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention of `query` over `key` and `value`, its own token included.

    Args:
        query: `[b, h, t, d]`.
        key: `[b, h, t, d]`.
        value: `[b, h, t, dv]`.
        scale: multiplies the result, not the state.
        decay: logarithm of what is kept of the past when a token comes, floating: `[h]`, `[b, h, t]` or
            `[b, h, t, d]`. None keeps all; -inf keeps nothing; a positive one grows, and may overflow.
        state: `[b, h, d, dv]`, what came before the first token; None: nothing.

    Returns:
        `[b, h, t, dv]`, contiguous, dtype of `query`; and the state after the last token, `[b, h, d, dv]`,
        float32 or wider. Accumulated in that dtype. Where an operand is NaN or infinite, its token and those
        behind it are one of both, and no token before it is. The gradients of any token may be NaN then.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (query, key, value))
    q = q * scale
    t = query.shape[-2]
    if decay is None:
        out = causal_product(torch.matmul(q, k.transpose(-2, -1)).tril(), v)
        left, right, kept = q, k, None
    else:
        between, start, end = _spans(decay.to(wide), t)
        left, right, kept = q * start.exp(), k * end.exp(), decay.to(wide)
        steps = kept.view(-1, 1, 1).expand(-1, t, 1) if decay.dim() == 1 else kept
        kept = steps.sum(-2) if decay.dim() != 3 else steps.sum(-1, keepdim=True)
        if decay.dim() == 4:
            pairs = (q.unsqueeze(-2) * k.unsqueeze(-3) * between.exp()).sum(-1)
        else:
            pairs = torch.matmul(q, k.transpose(-2, -1)) * between.squeeze(-1).exp()
        out = causal_product(pairs.tril(), v)
    last = torch.matmul(right.transpose(-2, -1), v)
    if state is not None:
        past = state.to(wide)
        out = out + torch.matmul(left, past)
        last = last + (past if kept is None else kept.exp().unsqueeze(-1) * past)
    return out.to(query.dtype).contiguous(), last.contiguous()
