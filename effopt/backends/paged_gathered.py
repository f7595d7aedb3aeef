"""Attention over pages that are gathered first, by `scaled_dot_product_attention`: for small calls.

All that the table has room for is copied in order, and one call attends to it. That is more to move than what
requests hold, and less to start than a call for each: of many short requests it is the faster way.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from effopt.backends.base import Lowering, by_operands
from effopt.graph import ops
from effopt.graph.ops.base import Operands, hint
from effopt.graph.ops.paged_attention import check_call, gathered, rows_seen
from effopt.target import Target

_CALL_S = 2e-5
"""Seconds beside the bytes, by guess: of the gathers, the mask and the call."""


@by_operands(ops.paged_attention)
def paged_attention(operands: Operands) -> Tensor:
    """`ops.paged_attention` over gathered keys and values; arguments as there."""
    query, key_pages, value_pages, table, lengths = (operands[name] for name in _TENSORS)
    check_call(query, key_pages, value_pages, table, lengths)
    key, value = (gathered(x, table, lengths) for x in (key_pages, value_pages))
    seen = rows_seen(lengths, query.shape[2], key.shape[2])
    query = query if query.stride(-1) == 1 else query.contiguous()
    is_grouped = bool(key.shape[1] != query.shape[1])
    out = F.scaled_dot_product_attention(
        query, key, value, seen, scale=operands["scale"], enable_gqa=is_grouped
    )
    return out.contiguous()


_TENSORS = ("query", "key_pages", "value_pages", "page_table", "lengths")


def _supports(target: Target, operands: Operands) -> str | None:
    if operands["softcap"]:
        return "scaled_dot_product_attention has no soft-cap"
    d, dv = operands["key_pages"].shape[-1], operands["value_pages"].shape[-1]
    if target.device_type == "cpu" and not statically_known_true(d == dv):
        return f"the CPU kernel wants equal head sizes, got {d} and {dv}"
    return None


def _cost(target: Target, operands: Operands, result: Tensor) -> float:
    """The roofline of all that the table has room for: read, written in order and read again."""
    (b, h, t, _), (_, hkv, page, _) = (map(hint, operands[n].shape) for n in ("query", "key_pages"))
    room = hint(operands["page_table"].shape[1]) * page
    channels = sum(hint(operands[name].shape[-1]) for name in ("key_pages", "value_pages"))
    moved = 3.0 * b * room * hkv * channels * operands["key_pages"].element_size()
    work = b * h * t * room * (2.0 * channels + 5.0)
    return max(moved / target.bytes_per_s, work / target.flops_per_s) + _CALL_S


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(ops.paged_attention, "gathered", paged_attention, _supports, _cost, differentiable=False),
)
