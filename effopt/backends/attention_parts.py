"""Attention over a part of the keys, by PyTorch's CPU kernel, which knows the log-sum-exp of its rows.

What was checked on torch 2.13: it takes grouped queries, a mask only of the query's dtype, and with
causality none; a row that sees no key gives 0 and a log-sum-exp of 0, which is made -inf here. Autograd takes
the log-sum-exp for a constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.backends.base import Lowering, by_operands
from effopt.graph import ops
from effopt.graph.ops.attention import open_keys, score_flops
from effopt.graph.ops.base import Operands, hint
from effopt.target import Target

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@by_operands(ops.attention_lse)
def flash_lse(operands: Operands) -> tuple[Tensor, Tensor]:
    """`ops.attention_lse` by `_scaled_dot_product_flash_attention_for_cpu`; arguments as there."""
    query, key, value, bias, mask = (operands[n] for n in ("query", "key", "value", "bias", "mask"))
    bounds = (operands[n] for n in ("low", "high", "query_ids", "key_ids"))
    seen = open_keys(query.shape[-2], key.shape[-2], query.device, *bounds)
    mask = seen if mask is None else (mask if seen is None else mask & seen)
    added = bias
    if mask is not None:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        added = torch.where(mask, zero if bias is None else bias, -math.inf)
    if added is not None:
        added = added.to(query.dtype)
        while added.dim() not in (2, 4):
            added = added.unsqueeze(0)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    is_causal, scale = operands["is_causal"], operands["scale"]
    out, lse = flash(query, key, value, 0.0, is_causal, attn_mask=added, scale=scale)
    if added is not None:
        lse = torch.where((added > -math.inf).any(dim=-1), lse, -math.inf)
    return out.contiguous(), lse.contiguous()


def _supports(target: Target, operands: Operands) -> str | None:
    query, value = operands["query"], operands["value"]
    if target.device_type != "cpu":
        return f"runs on a CPU, this is {target.device_type}"
    if operands["softcap"] or operands["sinks"] is not None:
        return "the CPU kernel has no soft-cap and no sinks"
    if query.dtype not in DTYPES:
        return f"the CPU kernel has no {query.dtype}"
    sizes = (*query.shape, *operands["key"].shape)
    if not all(statically_known_true(size > 0) for size in sizes):
        # torch 2.13 divides by the sizes: the process dies. SDPA itself never calls it so.
        return "a size that is 0, or may be: the CPU kernel takes none"
    if not statically_known_true(query.shape[-1] == value.shape[-1]):
        return f"the CPU kernel wants equal head sizes, got {query.shape[-1]} and {value.shape[-1]}"
    masked = ("bias", "mask", "low", "high", "query_ids")
    if operands["is_causal"] and any(operands[name] is not None for name in masked):
        return "causal and a mask: the CPU kernel takes one"
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline. A mask is written and read, and nothing that it hides is skipped."""
    work, moved = ops.attention_lse.flops(operands, result), ops.attention_lse.bytes_moved(operands, result)
    if any(operands[name] is not None for name in ("low", "high", "query_ids")):
        work = score_flops(operands)
        moved += 2.0 * hint(operands["query"].shape[-2]) * hint(operands["key"].shape[-2])
    return max(moved / target.bytes_per_s, work / target.flops_per_s)


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(ops.attention_lse, "cpu-flash", flash_lse, _supports, _cost, differentiable=False),
)
