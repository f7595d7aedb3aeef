"""Library kernels: `scaled_dot_product_attention`.

What was checked on torch 2.13, CPU: the flash kernel is taken for 4-D operands with unit last stride and
equal head sizes, without dropout, with a mask of 2 or 4 dimensions that needs no gradient, grouped
queries included; anything else falls to a slow composite. Every kernel gives 0 for a row that sees no
key, where softmax gives NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from effopt.backends.base import Lowering, by_operands
from effopt.graph import ops
from effopt.graph.ops.attention import open_keys, score_flops
from effopt.graph.ops.base import Operands, hint
from effopt.target import Target

_ABSORBING = -1e30
"""A fill at or below this, added to a score, is the fill again in float32 and bfloat16."""
_UNREACHED = -1e9
"""No score comes near a fill at or below this: float32 is spaced by 64 there."""


@by_operands(ops.attention)
def sdpa(operands: Operands) -> Tensor:
    """`ops.attention` through `scaled_dot_product_attention`; arguments as there."""
    query, key, value, bias, mask = (operands[n] for n in ("query", "key", "value", "bias", "mask"))
    if bias is not None:
        bias = bias.to(torch.promote_types(bias.dtype, query.dtype))
    bounds = (operands[n] for n in ("low", "high", "query_ids", "key_ids", "anchors", "prefix"))
    seen = open_keys(query.shape[-2], key.shape[-2], query.device, *bounds)
    if seen is not None:
        mask = seen if mask is None else mask & seen
    allowed = _mask_for_kernel(bias, mask)
    q, k, v = (_four_dimensional(x, query.dim()) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        None if allowed is None else _four_dimensional(allowed, query.dim(), is_mask=True),
        operands["dropout_p"],
        operands["is_causal"],
        scale=operands["scale"],
        # Of symbolic heads a comparison is no bool until it is asked for.
        enable_gqa=bool(query.dim() == 4 and key.shape[1] != query.shape[1]),
    )
    out = out.reshape(*query.shape[:-1], value.shape[-1])
    fill = operands["fill"]
    keeps_zero = operands["zero_masked_rows"] and (mask is None or fill is None or not math.isfinite(fill))
    if keeps_zero or operands["rows_see_key"]:
        return out
    return restore_blind_rows(out, value, bias, mask, fill)


def _mask_for_kernel(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Mask and bias as the one operand that the kernel takes.

    Masked scores are -inf, whatever `fill` is: rows without a key are given theirs afterwards. The CPU
    kernel's backward is wrong for rows of the least finite number: it recomputes weights of 1, not 1/s
    (torch 2.13).
    """
    if mask is None:
        return bias
    return mask if bias is None else torch.where(mask, bias, -math.inf)


def _absorbs(fill: float, dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).min <= fill <= _ABSORBING


def restore_blind_rows(
    out: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, fill: float | None
) -> Tensor:
    """Give rows that see no key what softmax gives: NaN for -inf, the mean of the values for a finite one."""
    infinite = fill is None or fill == -math.inf
    if mask is not None and not infinite:
        mean = value.mean(dim=-2, keepdim=True)
        if value.dim() == 4 and value.shape[1] != out.shape[1]:
            mean = mean.repeat_interleave(out.shape[1] // value.shape[1], dim=1)
        return torch.where(mask.any(dim=-1, keepdim=True), out, mean)
    sees = None if mask is None else mask
    if bias is not None:
        seen = bias != -math.inf
        sees = seen if sees is None else sees & seen
    if sees is None:
        return out
    return torch.where(sees.any(dim=-1, keepdim=True), out, math.nan)


def _four_dimensional(x: Tensor, rank: int, is_mask: bool = False) -> Tensor:
    """`[b, h, t, d]`; an operand without heads is given one. A mask may keep 2 dimensions."""
    if rank == 4:
        while is_mask and (x.dim() < 2 or x.dim() == 3):
            x = x.unsqueeze(0)
    elif rank == 3:
        x = x.unsqueeze(1) if x.dim() == 3 else x
    elif not is_mask:
        x = x.reshape(-1, 1, *x.shape[-2:]) if rank > 4 else x[None, None]
    return x if is_mask or x.stride(-1) == 1 else x.contiguous()


def _supports(target: Target, operands: Operands) -> str | None:
    """For training: what `_supports_forward` takes, less a bias that may leave a row to its lowest number."""
    if operands["bias"] is not None and not operands["zero_masked_rows"]:
        return "a bias: the kernel gives it no gradient, and a wrong one to rows that it hides"
    return _supports_forward(target, operands)


def _supports_bias(target: Target, operands: Operands) -> str | None:
    if operands["bias"] is None or operands["zero_masked_rows"]:
        return "there is no bias to be careful with; `sdpa` is the same kernel, with gradients"
    return _supports_forward(target, operands)


def _supports_forward(target: Target, operands: Operands) -> str | None:
    query, key, value = operands["query"], operands["key"], operands["value"]
    bias, is_masked = operands["bias"], _is_masked(operands)
    if operands["softcap"]:
        return "scaled_dot_product_attention has no soft-cap"
    if operands["sinks"] is not None:
        return "scaled_dot_product_attention has no sinks"
    if operands["is_causal"] and (bias is not None or is_masked):
        return "causal and a mask: scaled_dot_product_attention takes one"
    if (bias is not None or is_masked) and query.dim() > 4:
        return f"a mask over {query.dim() - 2} leading dimensions; the kernel has batch and heads"
    fill = operands["fill"] if is_masked else None
    return _refuses_fill(query.dtype, bias, fill) or _misses_kernel(target, operands, query, key, value)


def _is_masked(operands: Operands) -> bool:
    return any(operands[name] is not None for name in ("mask", "low", "high", "query_ids"))


def _refuses_fill(dtype: torch.dtype, bias: Any, fill: float | None) -> str | None:
    if fill is None or not math.isfinite(fill):
        return None
    if fill > _UNREACHED and not _absorbs(fill, dtype):
        return f"masked scores become {fill:g}, which is not far below every score; fill with -inf"
    if bias is not None and not _absorbs(fill, dtype):
        return f"a bias, and a mask that fills with {fill:g}; fill with -inf"
    return None


def _misses_kernel(target: Target, operands: Operands, query: Any, key: Any, value: Any) -> str | None:
    """Why only the composite of scaled_dot_product_attention would run, slower than the reference."""
    bias = operands["bias"]
    if target.device_type == "cpu":
        if operands["dropout_p"]:
            return "the CPU kernel has no dropout"
        if not statically_known_true(query.shape[-1] == value.shape[-1]):
            return f"the CPU kernel wants equal head sizes, got {query.shape[-1]} and {value.shape[-1]}"
    elif bias is not None and bias.dtype != query.dtype:
        return f"the bias is {bias.dtype} and the query {query.dtype}; the kernel wants one dtype"
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline. A mask of a band or ids is written and read, and nothing that it hides is skipped."""
    moved, work = ops.attention.bytes_moved(operands, result), ops.attention.flops(operands, result)
    if any(operands[name] is not None for name in ("low", "high", "query_ids")):
        t, s = hint(operands["query"].shape[-2]), hint(operands["key"].shape[-2])
        ids = operands["query_ids"]
        moved += 2.0 * t * s * (hint(ids.shape[0]) if ids is not None and ids.dim() == 2 else 1)
        work = score_flops(operands)
    return max(moved / target.bytes_per_s, work / target.flops_per_s)


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(ops.attention, "sdpa", sdpa, _supports, _cost),
    Lowering(ops.attention, "sdpa-with-bias", sdpa, _supports_bias, _cost, differentiable=False),
)
