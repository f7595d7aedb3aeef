"""Causal attention whose backward suits a CPU: the flash kernel forward, matrix products in blocks backward.

    p  = exp(scale q k' - logsumexp)                dv = p' do
    ds = p * (do v' - rowsum(do * o))               dq = scale ds k      dk = scale ds' q

The flash kernel's own backward works in tiles too small for a CPU's matrix unit; README.md has both times.
Source: Dao et al. 2022, arXiv:2205.14135, appendix B.2.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK = 256
"""Queries at a time: what lies above the diagonal is computed only inside a block."""
NAME = "causal-blocks"

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class CausalAttention(torch.autograd.Function):
    """q [b, h, t, d], k and v [b, hkv, t, d] -> [b, h, t, d], all of one dtype."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        out, logsumexp = flash(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 0.0, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        (b, h, t, d), hkv = q.shape, k.shape[1]
        groups = (b * hkv, h // hkv, t)
        delta = (grad.float() * out.float()).sum(-1).reshape(*groups, 1)
        logsumexp = logsumexp.reshape(*groups, 1)
        q, grad, k, v = q.reshape(*groups, d), grad.reshape(*groups, d), k.flatten(0, 1), v.flatten(0, 1)
        rows, dk, dv = [], 0.0, 0.0
        for lo in range(0, t, BLOCK):
            hi = min(lo + BLOCK, t)
            flat, square = (b * hkv, -1, d), (b * hkv, h // hkv, hi - lo, hi)
            qi, gi = q[:, :, lo:hi].reshape(flat), grad[:, :, lo:hi].reshape(flat)
            ki, vi = k[:, :hi], v[:, :hi]
            scores = torch.bmm(qi, ki.mT).view(square).float() * ctx.scale
            seen = torch.arange(hi, device=q.device) <= torch.arange(lo, hi, device=q.device)[:, None]
            p = torch.where(seen, torch.exp(scores - logsumexp[:, :, lo:hi]), 0.0)
            ds = p * (torch.bmm(gi, vi.mT).view(square).float() - delta[:, :, lo:hi]) * ctx.scale
            p, ds = p.to(q.dtype).view(b * hkv, -1, hi), ds.to(q.dtype).view(b * hkv, -1, hi)
            rows.append(torch.bmm(ds, ki).view(b * hkv, h // hkv, hi - lo, d))
            below = (0, 0, 0, t - hi)
            dk = dk + torch.nn.functional.pad(torch.bmm(ds.mT, qi), below)
            dv = dv + torch.nn.functional.pad(torch.bmm(p.mT, gi), below)
        return torch.cat(rows, 2).view(b, h, t, d), dk.view(b, hkv, t, d), dv.view(b, hkv, t, d), None


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls; the result is [b, t, h, d].

    Under autocast the rotation leaves q and k in float32, so they are brought back to the dtype of v.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    return CausalAttention.apply(query, key, value, scaling).transpose(1, 2), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Training sequences have no padding, and the attention above is causal by itself."""


def register() -> None:
    """Make the name known to transformers: `config._attn_implementation = "causal-blocks"`."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, no_mask)
