"""Attention on a CPU that computes only the keys which bands, ids or padding leave open to queries.

Rows for which `known_rows.py` finds such keys by their bounds are computed in few calls of the kernel, the
others in blocks. `key_blocks.py` finds the keys of a block. With them a block is an attention of its own,
with a mask only where its edges are ragged: `scaled_dot_product_attention`, or the op's reference for
soft-cap and sinks. A row that sees no key gets what softmax gives it over all keys: NaN, the mean of the
values for a finite fill, or 0 as SDPA gives.

Source: Dao et al. 2022, arXiv:2205.14135, section 3.3 (block-sparse: blocks that are masked are not read).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from effopt.backends.band_steps import STEP
from effopt.backends.base import Lowering, by_operands
from effopt.backends.block_attention_gradients import backward
from effopt.backends.key_blocks import Block, Call, allowed_in, block_size, blocks_of, open_in, part_in
from effopt.backends.known_rows import Rows, attend, rows_of
from effopt.graph import ops
from effopt.graph.ops.attention import band_share, score_flops
from effopt.graph.ops.base import Operands, hint, tensor_bytes
from effopt.target import Target

_UNREACHED = -1e9
"""No score comes near a fill at or below this: what is masked takes no weight from what is not."""
_CALL_S = 4e-5
"""Seconds that a block, or rows that are known, take beside their arithmetic: slices, a call, a copy."""
_CALLS = 4
"""Calls of a band: the rows of its beginning, two ranges of the others, and what is left at the end."""
_STEPWISE = 2.0
"""How much longer soft-cap and sinks take, which the reference computes step by step."""
_BIASED = 1.5
"""How much longer a bias takes, masked for each block: 1.2 to 1.6 times (t 256 to 2048, 8 heads, 2 cores)."""
_ROW_KEYS = 100
"""Keys that could be computed in the time that a row takes in each range, measured for t 128 to 2048."""
_GUESSED_LENGTH = 256
"""Tokens of a document, where values tell."""
_GUESSED_SHARE = 0.5
"""Share of keys that is guessed to be open where values tell: a row of two documents, a cache half full."""


def _attend(call: Call, block: Block, q: Tensor, k: Tensor, v: Tensor, mean: Tensor) -> Tensor:
    """The rows of one block. `mean` is that of all values, for rows that see none by a finite fill."""
    bias = None if call.bias is None else part_in(call.bias, block)
    stepwise = bool(call.softcap) or call.sinks is not None
    kept = call.rows_see_key or call.sinks is not None
    kept = kept or (call.zero_masked_rows and not math.isfinite(call.fill))
    seen = None if kept and bias is None and not stepwise else open_in(call, block)
    if seen is not None and bias is not None:
        bias = torch.where(seen, bias, -math.inf)
    if stepwise:
        settings = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        mask = seen if bias is None else None
        out: Tensor = ops.attention.reference(
            q, k, v, bias=bias, mask=mask, zero_masked_rows=True, **settings
        )
    else:
        allowed = allowed_in(call, block) if bias is None else _like(bias, q)
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, allowed, scale=call.scale, enable_gqa=grouped)
    hiding = seen if bias is None else bias != -math.inf
    if hiding is None or kept:
        return out
    return torch.where(hiding.any(-1, keepdim=True), out, mean)


def _like(bias: Tensor, q: Tensor) -> Tensor:
    """As the kernel takes it: 2 or 4 dimensions, in a dtype that holds the query's."""
    bias = bias.to(torch.promote_types(bias.dtype, q.dtype))
    return bias if bias.dim() == 4 else bias[(None,) * (4 - bias.dim())]


def _mean(call: Call) -> Tensor:
    """Mean of the values of each head, `[b, h, 1, dv]`; what a row without keys gets, if that is not NaN."""
    b, h, dv = call.query.shape[0], call.query.shape[1], call.value.shape[-1]
    if not call.gives_mean:
        nan = call.sinks is None and not call.zero_masked_rows and not call.rows_see_key
        return call.value.new_full((b, h, 1, dv), math.nan if nan else 0.0)
    return call.value.mean(dim=-2, keepdim=True).repeat_interleave(h // call.value.shape[1], dim=1)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The op, and the log-sum-exp of rows whose keys the kernel knows at once; of others, by blocks, 0."""
    out = call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
    lse = _no_lse(call.query)
    all_rows = list(rows_of(call))
    mean = out[:, :, :1] if all(rows.ranges for rows in all_rows) else _mean(call)
    for rows in all_rows:
        if rows.ranges:
            at = rows.batch, slice(None), rows.queries
            out[at], lse[at] = attend(call, rows)
        else:
            _by_blocks(call, rows, out, mean)
    return out, lse


def _no_lse(query: Tensor) -> Tensor:
    return query.new_zeros(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))


def _by_blocks(call: Call, rows: Rows, out: Tensor, mean: Tensor) -> None:
    for block in blocks_of(call, rows.batch, rows.queries):
        batch, queries = block.batch, block.queries
        into = out[batch, :, queries]
        if block.is_empty:
            into.copy_(mean[batch].expand_as(into))
            continue
        q, k, v = call.query[batch, :, queries], *(block.read(x[batch], 2) for x in (call.key, call.value))
        into.copy_(_attend(call, block, q, k, v, mean[batch]))


_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? sinks, Tensor? query_ids,"
    " Tensor? key_ids, float scale, float fill, float softcap, SymInt low, SymInt high,"
    " SymInt anchors, SymInt prefix, bool zero_masked_rows, bool rows_see_key"
)


@torch.library.custom_op(
    "effopt_cpu::block_attention",
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor)",
    device_types="cpu",
)
def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    return forward(Call(*given))


@torch.library.custom_op(
    "effopt_cpu::block_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, bool needs_bias, {_SCHEMA}) -> Tensor[]",
    device_types="cpu",
)
def _backward(grad: Tensor, out: Tensor, lse: Tensor, needs_bias: bool, *given: Any) -> list[Tensor]:
    return backward(Call(*given), (grad, out, lse), needs_bias)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty((*query.shape[:-1], value.shape[-1])), _no_lse(query)


@_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, needs_bias: bool, *given: Any) -> list[Tensor]:
    query, key, value, bias, _, sinks = given[:6]
    wide = torch.promote_types(grad.dtype, torch.float32)
    made = [torch.empty_like(x) for x in (query, key, value)]
    of_bias = grad.new_empty(bias.shape if needs_bias and bias is not None else (0,), dtype=wide)
    of_sinks = grad.new_empty(() if sinks is None else sinks.shape, dtype=wide)
    return [
        *made,
        of_bias if bias is None else of_bias.to(bias.dtype),
        of_sinks if sinks is None else of_sinks.to(sinks.dtype),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.rest = inputs[8:]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    out, lse, *tensors = ctx.saved_tensors
    made = _backward(grad, out, lse, needs[3], *tensors, *ctx.rest)
    query, key, value, bias, sinks = (
        g if n else None for g, n in zip(made, (*needs[:4], needs[5]), strict=True)
    )
    return (query, key, value, bias, None, sinks, *(None,) * 11)


_forward.register_autograd(_differentiate, setup_context=_save)


@by_operands(ops.attention)
def block_attention(operands: Operands) -> Tensor:
    """`ops.attention` without the keys that no row of a block sees; arguments as there."""
    names = ("query", "key", "value", "bias", "mask", "sinks", "query_ids", "key_ids")
    tensors = [operands[name] for name in names]
    tensors[:3] = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors[:3])
    low = -tensors[0].shape[-2] if operands["low"] is None else operands["low"]
    high = tensors[1].shape[-2] if operands["high"] is None else operands["high"]
    prefix = operands["prefix"] or 0
    if operands["is_causal"]:
        high, prefix = torch.sym_min(high, 0), 0
    floor = -math.inf if operands["fill"] is None else operands["fill"]
    scores = (operands["scale"], floor, operands["softcap"])
    rows = (operands["zero_masked_rows"], operands["rows_see_key"])
    out, _ = _forward(*tensors, *scores, low, high, operands["anchors"] or 0, prefix, *rows)
    return out


def _supports(target: Target, operands: Operands) -> str | None:
    if target.device_type != "cpu":
        return f"runs on a CPU, this is {target.device_type}"
    if operands["query"].dim() != 4:
        return f"wants a batch and heads, 4 dimensions, got {operands['query'].dim()}"
    if operands["dropout_p"]:
        return "has no dropout"
    if operands["is_causal"] and operands["prefix"] is not None and operands["high"] is not None:
        return "causal, and first keys that a band behind it does not mask: one of the two at a time"
    told = any(operands[name] is not None for name in ("low", "high", "query_ids"))
    if not told and not (operands["is_causal"] and _is_stepwise(operands)) and not _is_cache(operands):
        return "no band and no ids are proved: which keys could be left out is not known"
    return _refuses_fill(operands)


def _is_cache(operands: Operands) -> bool:
    """Whether one query reads a cache by a mask: that of a static cache, whose last keys are not written."""
    mask, t = operands["mask"], operands["query"].shape[-2]
    return mask is not None and mask.dim() > 0 and statically_known_true(t == 1)


def _refuses_fill(operands: Operands) -> str | None:
    fill, bias = operands["fill"], operands["bias"]
    if fill is None or not math.isfinite(fill):
        return None
    if fill > _UNREACHED:
        return f"masked scores become {fill:g}, which is not far below every score; fill with -inf"
    if bias is not None:
        return f"a bias, and a mask that fills with {fill:g}; fill with -inf"
    if operands["is_causal"]:
        return f"causal, and a mask that fills with {fill:g}; fill with -inf"
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline of the pairs that are computed, and a constant for each call."""
    s, t = hint(operands["key"].shape[-2]), hint(operands["query"].shape[-2])
    edge, calls = _edge_and_calls(operands, t, s)
    guessed = 1.0 if operands["query_ids"] is None and not _is_cache(operands) else _GUESSED_SHARE
    slower = _STEPWISE if _is_stepwise(operands) else _BIASED if operands["bias"] is not None else 1.0
    share = band_share(operands) * guessed + edge / max(s, 1)
    work = share * score_flops(operands) * slower
    moved = ops.attention.bytes_moved(operands, result)
    if t == 1:
        moved -= (1.0 - guessed) * tensor_bytes([operands["key"], operands["value"]])
    return max(moved / target.bytes_per_s, work / target.flops_per_s) + calls * _CALL_S


def _edge_and_calls(operands: Operands, t: int, s: int) -> tuple[int, int]:
    """Keys that a row takes the time of beside those it sees, and calls that take a constant time each."""
    low = -t if operands["low"] is None else hint(operands["low"])
    high = s if operands["high"] is None else hint(operands["high"])
    high = min(high, 0) if operands["is_causal"] else high
    ids = operands["query_ids"]
    entries = hint(operands["query"].shape[0]) if ids is not None and ids.dim() == 2 else 1
    if operands["mask"] is None and operands["bias"] is None and not _is_stepwise(operands) and t > 1:
        joins = bool(operands["anchors"] or operands["prefix"]) or 0 < high < s
        edge = _ROW_KEYS * (2 if joins else 1) + (STEP if low > -t else 0)
        return edge, entries * (_CALLS + (math.ceil(t / _GUESSED_LENGTH) if ids is not None else 0))
    size = block_size(t, low, high, hint(operands["query"].shape[0]) * hint(operands["query"].shape[1]))
    return min(size, t - 1), entries * math.ceil(t / size)


def _is_stepwise(operands: Operands) -> bool:
    return bool(operands["softcap"]) or operands["sinks"] is not None


LOWERINGS: tuple[Lowering, ...] = (Lowering(ops.attention, "blocks", block_attention, _supports, _cost),)
"""Before the library kernels: where both are predicted alike, the one that reads less."""
