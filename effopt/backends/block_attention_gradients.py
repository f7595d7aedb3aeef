"""Gradients of the attention of `block_attention.py`.

Rows whose keys the kernel knows have its backward pass; of others the weights are computed again, by blocks.

Source: Dao et al. 2022, arXiv:2205.14135, appendix B.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effopt.backends.key_blocks import Block, Call, blocks_of, open_in, part, part_in
from effopt.backends.known_rows import add_gradients, rows_of


def backward(call: Call, given: tuple[Tensor, Tensor, Tensor], needs_bias: bool) -> list[Tensor]:
    """Gradients of query, key, value, bias and sinks; of the last two empty where not needed.

    Args:
        call: as it was computed.
        given: gradient of the results, the results, and the log-sum-exp of the rows that have one.
        needs_bias: whether to make that of the bias.
    """
    grad = given[0]
    into = _zeros(call, grad, needs_bias)
    for rows in rows_of(call):
        if rows.ranges:
            add_gradients(call, rows, given, (into.query, into.key, into.value))
            continue
        for block in blocks_of(call, rows.batch, rows.queries):
            _add_block(call, block, grad, into, needs_bias)
    if call.gives_mean:
        value = into.value
        value += into.mean.unflatten(1, (value.shape[1], -1)).sum(2) / value.shape[-2]
    operands = (call.query, call.key, call.value, call.bias, call.sinks)
    made = (into.query, into.key, into.value, into.bias, into.sinks)
    return [m if x is None else m.to(x.dtype) for m, x in zip(made, operands, strict=True)]


@dataclass(frozen=True)
class _Gradients:
    """What blocks add to, in float32 or wider; `mean` is that of the mean of all values."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    sinks: Tensor
    mean: Tensor


def _zeros(call: Call, grad: Tensor, needs_bias: bool) -> _Gradients:
    wide = torch.promote_types(grad.dtype, torch.float32)
    query, key, value = (torch.zeros_like(x, dtype=wide) for x in (call.query, call.key, call.value))
    bias = grad.new_zeros(call.bias.shape if needs_bias and call.bias is not None else (0,), dtype=wide)
    sinks = grad.new_zeros(() if call.sinks is None else call.sinks.shape, dtype=wide)
    mean = grad.new_zeros((*grad.shape[:2], 1, grad.shape[-1]), dtype=wide)
    return _Gradients(query, key, value, bias, sinks, mean)


def _add_block(call: Call, block: Block, grad: Tensor, into: _Gradients, needs_bias: bool) -> None:
    wide, batch, queries = into.query.dtype, block.batch, block.queries
    heads, hkv = call.query.shape[1], call.key.shape[1]
    rows = grad[batch, :, queries].to(wide)
    if block.is_empty:
        into.mean[batch] += rows.sum(-2, keepdim=True)
        return
    q = call.query[batch, :, queries].to(wide)
    k, v = (block.read(x[batch], 2).to(wide) for x in (call.key, call.value))
    k, v = (x.repeat_interleave(heads // hkv, 1) for x in (k, v))
    weights, slope, sink, blind = _weights(call, block, q, k)
    by_weight = rows @ v.mT
    held = (weights * by_weight).sum(-1, keepdim=True)
    by_score = weights * (by_weight - held)
    for columns, keys in block.segments if needs_bias else ():
        bias = part(into.bias, batch, queries, keys)
        bias += by_score[..., columns].sum_to_size(bias.shape)
    if sink is not None:
        into.sinks.sub_((sink * held).sum((0, 2, 3)))
    by_product = (by_score if slope is None else by_score * slope) * call.scale
    into.query[batch, :, queries] += by_product @ k
    by_key, by_value = (by_product.mT @ q), (weights.mT @ rows)
    for columns, keys in block.segments:
        into.key[batch, :, keys] += by_key[:, :, columns].unflatten(1, (hkv, -1)).sum(2)
        into.value[batch, :, keys] += by_value[:, :, columns].unflatten(1, (hkv, -1)).sum(2)
    into.mean[batch] += (rows * blind).sum(-2, keepdim=True)


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
