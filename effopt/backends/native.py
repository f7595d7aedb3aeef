"""Library kernels: scaled_dot_product_attention, and ATen's own linear and layer norm."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from effopt.backends.base import Lowering
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.target import Target


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    fill: Optional[float] = None,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    zero_masked_rows: bool = False,
) -> Tensor:
    """`ops.attention` through `scaled_dot_product_attention`; arguments as there."""
    grouped = query.dim() == 4 and key.shape[1] != query.shape[1]
    attn_mask = bias if bias is not None else mask
    if bias is not None and bias.dtype != query.dtype:
        attn_mask = bias.to(query.dtype)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
    )
    return out


def _supports(target: Target, operands: Operands) -> str | None:
    if operands["softcap"]:
        return "scaled_dot_product_attention has no soft-cap"
    if operands["sinks"] is not None:
        return "scaled_dot_product_attention has no sinks"
    if operands["bias"] is not None and operands["mask"] is not None:
        return "both a bias and a mask: scaled_dot_product_attention takes one"
    if operands["is_causal"] and (operands["bias"] is not None or operands["mask"] is not None):
        return "causal and a mask: scaled_dot_product_attention takes one"
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    op = ops.attention
    return max(
        op.bytes_moved(operands, result) / target.bytes_per_s, op.flops(operands, result) / target.flops_per_s
    )


LOWERINGS: tuple[Lowering, ...] = (Lowering(ops.attention, "sdpa", sdpa, _supports, _cost),)
