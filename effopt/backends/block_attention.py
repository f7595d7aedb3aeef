"""Attention on a CPU that computes only the keys which bands, ids or padding leave open to blocks of queries.

`key_blocks.py` finds the keys of a block. With them a block is an attention of its own, with a mask only
where its edges are ragged: `scaled_dot_product_attention`, or the op's reference for soft-cap and sinks. A
row that sees no key gets what softmax gives it over all keys: NaN, the mean of the values for a finite
fill, or 0 as SDPA gives. The backward pass computes the weights of each block again.

Source: Dao et al. 2022, arXiv:2205.14135, section 3.3 (block-sparse: blocks that are masked are not read) and
appendix B.2 (the gradients).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from effopt.backends.base import Lowering, by_operands
from effopt.backends.key_blocks import Block, Call, allowed_in, block_size, blocks_of, open_in, part, part_in
from effopt.graph import ops
from effopt.graph.ops.attention import band_share, score_flops
from effopt.graph.ops.base import Operands, hint, tensor_bytes
from effopt.target import Target

_UNREACHED = -1e9
"""No score comes near a fill at or below this: what is masked takes no weight from what is not."""
_BLOCK_S = 4e-5
"""Seconds that a block takes beside its arithmetic: slices, one call, one copy of the result."""
_STEPWISE = 2.0
"""How much longer soft-cap and sinks take, which the reference computes step by step."""
_BIASED = 1.5
"""How much longer a bias takes, masked for each block: 1.2 to 1.6 times (t 256 to 2048, 8 heads, 2 cores)."""
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
    if not _gives_mean(call):
        nan = call.sinks is None and not call.zero_masked_rows and not call.rows_see_key
        return call.value.new_full((b, h, 1, dv), math.nan if nan else 0.0)
    return call.value.mean(dim=-2, keepdim=True).repeat_interleave(h // call.value.shape[1], dim=1)


def _gives_mean(call: Call) -> bool:
    """Whether a row without keys gets the mean of all values."""
    return math.isfinite(call.fill) and not call.rows_see_key and call.sinks is None


def forward(call: Call) -> Tensor:
    """The op, block by block."""
    out = call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
    mean = _mean(call)
    for block in blocks_of(call):
        batch, queries = block.batch, block.queries
        into = out[batch, :, queries]
        if block.is_empty:
            into.copy_(mean[batch].expand_as(into))
            continue
        q, k, v = call.query[batch, :, queries], *(block.read(x[batch], 2) for x in (call.key, call.value))
        into.copy_(_attend(call, block, q, k, v, mean[batch]))
    return out


def backward(call: Call, grad: Tensor, needs_bias: bool) -> list[Tensor]:
    """Gradients of query, key, value, bias and sinks; of the last two empty where not needed."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    query, key, value = (torch.zeros_like(x, dtype=wide) for x in (call.query, call.key, call.value))
    bias = grad.new_zeros(call.bias.shape if needs_bias and call.bias is not None else (0,), dtype=wide)
    sinks = grad.new_zeros(() if call.sinks is None else call.sinks.shape, dtype=wide)
    heads, hkv = call.query.shape[1], call.key.shape[1]
    mean = grad.new_zeros((grad.shape[0], heads, 1, grad.shape[-1]), dtype=wide)
    for block in blocks_of(call):
        batch, queries = block.batch, block.queries
        rows = grad[batch, :, queries].to(wide)
        if block.is_empty:
            mean[batch] += rows.sum(-2, keepdim=True)
            continue
        q = call.query[batch, :, queries].to(wide)
        k, v = (block.read(x[batch], 2).to(wide) for x in (call.key, call.value))
        k, v = (x.repeat_interleave(heads // hkv, 1) for x in (k, v))
        weights, slope, sink, blind = _weights(call, block, q, k)
        by_weight = rows @ v.mT
        held = (weights * by_weight).sum(-1, keepdim=True)
        by_score = weights * (by_weight - held)
        for columns, keys in block.segments if needs_bias else ():
            into = part(bias, batch, queries, keys)
            into += by_score[..., columns].sum_to_size(into.shape)
        if sink is not None:
            sinks -= (sink * held).sum((0, 2, 3))
        by_product = (by_score if slope is None else by_score * slope) * call.scale
        query[batch, :, queries] += by_product @ k
        by_key, by_value = (by_product.mT @ q), (weights.mT @ rows)
        for columns, keys in block.segments:
            key[batch, :, keys] += by_key[:, :, columns].unflatten(1, (hkv, -1)).sum(2)
            value[batch, :, keys] += by_value[:, :, columns].unflatten(1, (hkv, -1)).sum(2)
        mean[batch] += (rows * blind).sum(-2, keepdim=True)
    if _gives_mean(call):
        value += mean.unflatten(1, (hkv, -1)).sum(2) / call.value.shape[-2]
    given = (call.query, call.key, call.value, call.bias, call.sinks)
    made = (query, key, value, bias, sinks)
    return [m if x is None else m.to(x.dtype) for m, x in zip(made, given, strict=True)]


def _weights(
    call: Call, block: Block, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Weights of a block, the slope of the soft-cap, the weight of the sinks, and which rows see no key."""
    scores, slope = q @ k.mT * call.scale, None
    if call.softcap:
        capped = torch.tanh(scores / call.softcap)
        scores, slope = call.softcap * capped, 1.0 - capped * capped
    bias, seen = None if call.bias is None else part_in(call.bias, block), open_in(call, block)
    scores = scores if bias is None else scores + bias
    scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    sink = None if call.sinks is None else call.sinks.to(scores.dtype).view(-1, 1, 1)
    peak = peak if sink is None else torch.maximum(peak, sink)
    blind = peak == -math.inf
    weights = (scores - peak.masked_fill(blind, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    held = None if sink is None else (sink - peak).exp()
    total = (total if held is None else total + held).masked_fill(blind, 1.0)
    return weights / total, slope, None if held is None else held / total, blind


_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? sinks, Tensor? query_ids,"
    " Tensor? key_ids, float scale, float fill, float softcap, SymInt low, SymInt high,"
    " SymInt anchors, SymInt prefix, bool zero_masked_rows, bool rows_see_key"
)


@torch.library.custom_op(
    "effopt_cpu::block_attention", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor", device_types="cpu"
)
def _forward(*given: Any) -> Tensor:
    return forward(Call(*given))


@torch.library.custom_op(
    "effopt_cpu::block_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, bool needs_bias, {_SCHEMA}) -> Tensor[]",
    device_types="cpu",
)
def _backward(grad: Tensor, needs_bias: bool, *given: Any) -> list[Tensor]:
    return backward(Call(*given), grad, needs_bias)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@_backward.register_fake
def _(grad: Tensor, needs_bias: bool, *given: Any) -> list[Tensor]:
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    made = _backward(grad, needs[3], *ctx.saved_tensors, *ctx.rest)
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
    return _forward(*tensors, *scores, low, high, operands["anchors"] or 0, prefix, *rows)


def _supports(target: Target, operands: Operands) -> str | None:
    if target.device_type != "cpu":
        return f"runs on a CPU, this is {target.device_type}"
    if operands["query"].dim() != 4:
        return f"wants a batch and heads, 4 dimensions, got {operands['query'].dim()}"
    if operands["dropout_p"]:
        return "has no dropout"
    if operands["is_causal"] and operands["prefix"] is not None and operands["high"] is not None:
        return "causal, and first keys that a band behind it does not mask: one of the two at a time"
    stepwise = bool(operands["softcap"]) or operands["sinks"] is not None
    told = any(operands[name] is not None for name in ("low", "high", "query_ids"))
    if not told and not (operands["is_causal"] and stepwise) and not _is_cache(operands):
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
    """The roofline of what is left in blocks, and a constant for each block."""
    query, s = operands["query"], hint(operands["key"].shape[-2])
    t = hint(query.shape[-2])
    low = -t if operands["low"] is None else hint(operands["low"])
    high = s if operands["high"] is None else hint(operands["high"])
    lanes = hint(query.shape[0]) * hint(query.shape[1])
    size = block_size(t, low, min(high, 0) if operands["is_causal"] else high, lanes)
    share = min(1.0, band_share(operands) + min(size, t - 1) / max(s, 1))
    ids = operands["query_ids"]
    guessed = 1.0 if ids is None and not _is_cache(operands) else _GUESSED_SHARE
    share *= guessed
    entries = hint(query.shape[0]) if ids is not None and ids.dim() == 2 else 1
    stepwise = bool(operands["softcap"]) or operands["sinks"] is not None
    slower = _STEPWISE if stepwise else _BIASED if operands["bias"] is not None else 1.0
    work = share * score_flops(operands) * slower
    moved = ops.attention.bytes_moved(operands, result)
    if t == 1:
        moved -= (1.0 - guessed) * tensor_bytes([operands["key"], operands["value"]])
    blocks = entries * math.ceil(t / size)
    return max(moved / target.bytes_per_s, work / target.flops_per_s) + blocks * _BLOCK_S


LOWERINGS: tuple[Lowering, ...] = (Lowering(ops.attention, "blocks", block_attention, _supports, _cost),)
"""Before the library kernels: where both are predicted alike, the one that reads less."""
