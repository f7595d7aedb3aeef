"""Which calls of attention the kernels here take, and the operands of one as they take them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.backends.triton.attention_tiles import AttentionCall
from effopt.backends.triton.rows import check_floating, refusal
from effopt.graph.ops.base import Operands
from effopt.target import Target

MAX_HEAD_SIZE = 256
"""Longest head that tiles are cut for; a program holds whole heads."""
COPIED_ROWS = 64
"""Rows (queries, and heads of a group) from which on operands are copied to lie evenly. A decode step reads
its keys once: a copy would take longer."""
Comparison = Callable[[Any, Any], bool]


def prepare(operands: Operands, drops: bool = False) -> tuple[Any, ...]:
    """Operands of the op, checked, as the arguments of the custom ops: tensors of 4 dimensions, all views.

    Those of dropout are not among them; `drops` says that the caller has it.

    Raises:
        TypeError: a floating operand has a dtype that no kernel reads.
        ValueError: the operands do not fit together, or the kernels do not take such a call.
    """
    names = ("query", "key", "value", "bias", "sinks")
    check_floating(**{name: operands[name] for name in names})
    reason = call_refusal(operands, _may_be_same, drops)
    if reason is not None:
        raise ValueError(reason)
    wide = [None if (x := operands[n]) is None else x[(None,) * (4 - x.dim())] for n in (*names[:4], "mask")]
    fill = -math.inf if operands["fill"] is None else operands["fill"]
    rest = ("softcap", "low", "high", "is_causal", "zero_masked_rows", "rows_see_key", "anchors", "prefix")
    tensors = (*wide, operands["sinks"], operands["query_ids"], operands["key_ids"])
    return (*tensors, operands["scale"], fill, *(operands[name] for name in rest))


def as_given(out: Tensor, operands: Operands) -> Tensor:
    """The result of a custom op, of 4 dimensions, in those of the query."""
    return out.reshape((*operands["query"].shape[:-1], operands["value"].shape[-1]))


def checked(*given: Any) -> AttentionCall:
    """The call of a custom op, whose sizes are numbers now, also where it was traced with symbols.

    Raises:
        ValueError: the operands do not fit together.
    """
    call = AttentionCall(*given)
    reason = call_refusal({**vars(call), "dropout_p": 0.0})
    if reason is not None:
        raise ValueError(reason)
    _, _, group, t, _ = call.sizes
    if t * group < COPIED_ROWS:
        return call
    return replace(call, query=evenly(call.query), key=evenly(call.key), value=evenly(call.value))


def evenly(x: Tensor) -> Tensor:
    """`x`, or a copy of it if its lines are not next to each other, or do not begin at multiples of 16 bytes.

    Such keys go through registers, where prefill on sm_90 spills 328 to 432 bytes a thread of them; in a copy
    they are loaded ahead, and every tile of rows reads them. Lines of a length that 16 bytes do not divide
    are as uneven in a copy.
    """
    size = x.element_size()
    steps = [stride * size for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1][:-1]
    uneven = x.shape[-1] * size % 16 == 0 and any(begin % 16 for begin in (x.data_ptr(), *steps))
    gaps = x.shape[-1] > 1 and x.stride(-1) != 1
    return x.clone(memory_format=torch.contiguous_format) if gaps or uneven else x


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be the same."""
    return statically_known_true(a == b)


def _may_be_same(a: Any, b: Any) -> bool:
    return not statically_known_true(a != b)


def call_refusal(operands: Operands, same: Comparison = _same, drops: bool = False) -> str | None:
    """Why the kernels do not take such a call on any target, or None. Adds no guard on symbols."""
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    if operands["dropout_p"] and not drops:
        return f"dropout of {operands['dropout_p']:g}, and the kernel has none"
    if not 0.0 <= operands["dropout_p"] <= 1.0:
        return f"dropout of {operands['dropout_p']:g}, and the kernel wants a probability"
    if not 2 <= query.dim() <= 4 or not query.dim() == key.dim() == value.dim():
        ranks = f"{query.dim()}, {key.dim()} and {value.dim()}"
        return f"query, key and value have {ranks} dimensions, and the kernel wants 2 to 4, the same of each"
    if not query.dtype == key.dtype == value.dtype or query.dtype == torch.float64:
        dtypes = f"{query.dtype}, {key.dtype} and {value.dtype}"
        return f"query, key and value are {dtypes}; the kernel wants one dtype, float32 or narrower"
    return _size_refusal(query, key, value, same) or _mask_refusal(operands, same)


def _size_refusal(query: Tensor, key: Tensor, value: Tensor, same: Comparison) -> str | None:
    d, dv = query.shape[-1], value.shape[-1]
    if not isinstance(d, int) or not isinstance(dv, int):
        return f"head sizes {d} and {dv} are symbolic, and the kernel wants numbers to cut tiles of"
    if max(d, dv) > MAX_HEAD_SIZE or min(d, dv) < 1:
        return f"head sizes are {d} and {dv}, and the kernel wants 1 to {MAX_HEAD_SIZE}"
    alike = [same(d, key.shape[-1]), same(key.shape[-2], value.shape[-2])]
    alike += [same(a, b) for a, b in zip(key.shape[:-2], value.shape[:-2], strict=True)]
    if query.dim() != 4:
        alike += [same(a, b) for a, b in zip(query.shape[:-2], key.shape[:-2], strict=True)]
    else:
        h, hkv = query.shape[1], key.shape[1]
        alike += [same(query.shape[0], key.shape[0]), same(h, hkv) or same(h % hkv, 0)]
    if all(alike):
        return None
    shapes = ", ".join(f"{list(x.shape)}" for x in (query, key, value))
    wanted = "[b, h, t, d], [b, hkv, s, d], [b, hkv, s, dv]"
    return f"query, key and value are {shapes}, and the kernel wants {wanted}"


def _mask_refusal(operands: Operands, same: Comparison) -> str | None:
    """Of what is added to the scores or masks them."""
    query, key = operands["query"], operands["key"]
    full = (*query.shape[:-1], key.shape[-2])
    for name in ("bias", "mask"):
        x = operands[name]
        if x is None:
            continue
        sizes = full[len(full) - x.dim() :] if x.dim() <= len(full) else ()
        if len(sizes) != x.dim() or not all(
            same(a, 1) or same(a, b) for a, b in zip(x.shape, sizes, strict=True)
        ):
            return f"{name} is {list(x.shape)}, and is not known to broadcast to {list(full)}"
    mask, sinks, fill = operands["mask"], operands["sinks"], operands["fill"]
    if fill is not None and not fill < math.inf:
        return f"masked scores become {fill}, and the kernel wants a number or -inf"
    if mask is not None and mask.dtype != torch.bool:
        return f"mask is {mask.dtype}, and the kernel wants torch.bool; a mask that is added is a bias"
    if operands["bias"] is not None and operands["bias"].dtype == torch.float64:
        return "bias is torch.float64, and the kernel wants float32 or narrower"
    heads = query.shape[-3] if query.dim() > 2 else 1
    if sinks is not None and not (sinks.dim() == 1 and same(sinks.shape[0], heads)):
        return f"sinks is {list(sinks.shape)}, and the kernel wants [{heads}], one for each head"
    return _ids_refusal(operands, same)


def _ids_refusal(operands: Operands, same: Comparison) -> str | None:
    query = operands["query"]
    given = {"query_ids": query.shape[-2], "key_ids": operands["key"].shape[-2]}
    if (operands["query_ids"] is None) != (operands["key_ids"] is None):
        return "ids of queries without ids of keys, or the other way round; the kernel wants both or none"
    for name, length in given.items():
        x = operands[name]
        if x is None:
            continue
        fits = x.dim() in ((1, 2) if query.dim() == 4 else (1,)) and same(x.shape[-1], length)
        if not fits or (x.dim() == 2 and not (same(x.shape[0], query.shape[0]) or same(x.shape[0], 1))):
            return (
                f"{name} is {list(x.shape)}, and the kernel wants [{length}], or with a batch [b, {length}]"
            )
        if x.is_floating_point():
            return f"{name} is {x.dtype}, and the kernel wants integers"
    return None


def supports(target: Target, operands: Operands, drops: bool = False) -> str | None:
    """Why a kernel, one with dropout if it `drops`, does not take these operands on this target, or None."""
    floating = {name: operands[name] for name in ("query", "key", "value", "bias", "sinks")}
    return refusal(target, floating) or call_refusal(operands, drops=drops)


def supports_training(target: Target, operands: Operands) -> str | None:
    """The same for the kernels with dropout and a backward pass."""
    return supports(target, operands, drops=True)
