"""The gradients of attention, without scores in memory and without atomics.

A first kernel sums g * result over each row (`delta`). A second walks, for a tile of rows, over the tiles of
keys that the forward pass read, and sums the gradient of the queries. Keys and values have a kernel of their
own, `flash_attention_key_gradient.py`, and so has a bias that wants a gradient,
`flash_attention_bias_gradient.py`; that of the sinks is summed from what rows left. Each element is written
once, by one program, in one order: the bits repeat. The price is that scores are computed again in each: with
query and keys, seven products of a tile, where atomics need five.

Reads query, the result and its gradient once, and key and value once for each tile of rows that sees them.
Accumulates in float32.

Source: Dao 2023, arXiv:2307.08691, section 3.1, algorithm 2. Not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effopt.backends.triton.attention_gradients import (
    backward_tile_for,
    gradient_block,
    row_sums,
)
from effopt.backends.triton.attention_refusals import checked
from effopt.backends.triton.attention_scores import key_tiles, load_lines, place_of_program, score_block
from effopt.backends.triton.attention_tiles import AttentionCall
from effopt.backends.triton.flash_attention_bias_gradient import bias_gradient
from effopt.backends.triton.flash_attention_key_gradient import key_gradient
from effopt.backends.triton.rows import launch
from effopt.target import reads_shared_memory

SCHEMA = (
    "(Tensor grad, Tensor? grad_lse, Tensor out, Tensor peak, Tensor total, bool[] needs, Tensor query, "
    "Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? sinks, Tensor? query_ids, "
    "Tensor? key_ids, float scale, float fill, float softcap, SymInt? low, SymInt? high, bool is_causal, "
    "bool zero_masked_rows, bool rows_see_key, SymInt? anchors, SymInt? prefix, float dropout_p, "
    "Tensor? seed) -> Tensor[]"
)
DELTA_ROWS = 16
"""Rows that a program of the first kernel holds."""
TENSORS = 8
"""How many of the forward op's arguments are tensors that its backward pass reads."""


@triton.jit
def delta_kernel(
    p_grad, p_out, p_grad_lse, p_delta, grad_strides, h, t, rows,
    VALUE_HEAD: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each row the sum of gradient * result, less the gradient of the log-sum-exp."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row, o_dv = o_row < rows, tl.arange(0, BLOCK_DV)
    o_t, o_head, o_b = o_row % t, o_row // t % h, o_row // t // h
    p_line = p_grad + o_b * grad_strides[0] + o_head * grad_strides[1] + o_t * grad_strides[2]
    b_grad = load_lines(p_line, o_dv, m_row, grad_strides[3], VALUE_HEAD, False).to(tl.float32)
    b_out = load_lines(p_out + o_row * VALUE_HEAD, o_dv, m_row, 1, VALUE_HEAD, False).to(tl.float32)
    b_delta = tl.sum(b_grad * b_out, axis=1)
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o_row, mask=m_row, other=0.0)
    tl.store(p_delta + o_row, b_delta, mask=m_row)


@triton.jit(do_not_specialize=["t", "s", "low", "high", "anchors", "prefix", "span"])
def query_gradient_kernel(
    p_query, p_key, p_value, p_bias, p_mask, p_query_ids, p_key_ids, p_seed, p_grad, p_peak, p_total, p_delta,
    p_dquery, query_strides, key_strides, value_strides, bias_strides, mask_strides, query_ids_stride,
    key_ids_stride, grad_strides, hkv, group, t, s, low, high, anchors, prefix, span,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, FILL: tl.constexpr,
    HIDES: tl.constexpr, CAUSAL: tl.constexpr, MASK_OVER_KEYS: tl.constexpr, ANCHORS: tl.constexpr,
    PREFIX: tl.constexpr, ZERO_ROWS: tl.constexpr, DROPOUT: tl.constexpr, HEAD: tl.constexpr,
    VALUE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of rows, over the keys that they see."""
    tiles = tl.cdiv(t * group, ROWS)
    i_tile, _part, i_line = place_of_program(tiles, 1, span)
    i_tile = tiles - 1 - i_tile
    i_b, i_hkv = (i_line // hkv).to(tl.int64), (i_line % hkv).to(tl.int64)
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < t * group
    o_t, o_head = o_row // group, i_hkv * group + o_row % group
    o_far_t, o_line = o_t.to(tl.int64), (i_b * hkv * group + o_head) * t + o_t
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)

    p_row = p_query + i_b * query_strides[0] + o_head * query_strides[1] + o_far_t * query_strides[2]
    b_query = load_lines(p_row, o_d, m_row, query_strides[3], HEAD, False).to(DOT)
    p_row = p_grad + i_b * grad_strides[0] + o_head * grad_strides[1] + o_far_t * grad_strides[2]
    b_grad = load_lines(p_row, o_dv, m_row, grad_strides[3], VALUE_HEAD, False).to(DOT)
    b_peak, b_inverse, b_delta = row_sums(p_peak, p_total, p_delta, o_line, m_row, ZERO_ROWS)
    p_key += i_b * key_strides[0] + i_hkv * key_strides[1]
    p_value += i_b * value_strides[0] + i_hkv * value_strides[1]
    if p_mask is not None:
        p_mask += i_b * mask_strides[0]
        if not MASK_OVER_KEYS:
            p_mask += (o_head * mask_strides[1] + o_far_t * mask_strides[2])[:, None]
    if p_bias is not None:
        p_bias += i_b * bias_strides[0] + (o_head * bias_strides[1] + o_far_t * bias_strides[2])[:, None]
    b_query_ids = o_t
    if p_key_ids is not None:
        p_key_ids += i_b * key_ids_stride
        b_query_ids = tl.load(p_query_ids + i_b * query_ids_stride + o_t, mask=m_row, other=0).to(tl.int64)

    t_first, t_last = (i_tile * ROWS) // group, tl.minimum((i_tile * ROWS + ROWS - 1) // group, t - 1)
    stop, lead, gap, whole_first, whole_stop = key_tiles(
        t_first, t_last, s, low, high, anchors, prefix, p_mask, b_query_ids, p_key_ids, m_row,
        mask_strides[3], HIDES, CAUSAL, MASK_OVER_KEYS, ANCHORS, PREFIX, KEYS,
    )  # fmt: skip
    b_dquery = tl.zeros([ROWS, BLOCK_D], tl.float32)
    o_key = tl.arange(0, KEYS).to(tl.int64)
    for EDGE in tl.static_range(2):
        whole = whole_stop - whole_first
        for i in tl.range(0, stop - whole if EDGE else whole):
            if EDGE:
                i_s = i + tl.where(i >= whole_first, whole, 0)
                i_s += tl.where(i_s >= lead, gap, 0)
            else:
                i_s = whole_first + gap + i
            o_s = i_s * KEYS + tl.arange(0, KEYS)
            m_s = o_s < s
            i_key = i_s.to(tl.int64) * KEYS
            p_line = (p_key + i_key * key_strides[2]) + o_key * key_strides[2]
            b_key = load_lines(p_line, o_d, m_s, key_strides[3], HEAD, EDGE == 0).to(DOT)
            p_line = (p_value + i_key * value_strides[2]) + o_key * value_strides[2]
            b_value = load_lines(p_line, o_dv, m_s, value_strides[3], VALUE_HEAD, EDGE == 0).to(DOT)
            b_score, b_slope, b_open = score_block(
                b_query, b_key, p_bias, p_mask, b_query_ids, p_key_ids, o_t, o_s, m_row, m_s, low, high,
                anchors, prefix, bias_strides[3], mask_strides[3], SCALE, SOFTCAP, UNIT, FILL, CAUSAL,
                MASK_OVER_KEYS, ANCHORS, PREFIX, EDGE == 1,
            )  # fmt: skip
            _, _, b_by_product = gradient_block(
                b_score, b_slope, b_open, b_grad, b_value, b_peak, b_inverse, b_delta, p_seed, i_b, o_head,
                o_t, i_s, UNIT, DROPOUT, KEYS,
            )  # fmt: skip
            b_dquery = tl.dot(b_by_product.to(DOT), b_key, b_dquery, input_precision="ieee")
    b_dquery *= SCALE if SOFTCAP != 0.0 else SCALE / UNIT
    p_tile = p_dquery + o_line[:, None] * HEAD + o_d[None, :]
    tl.store(p_tile, b_dquery.to(p_dquery.dtype.element_ty), mask=m_row[:, None] & (o_d < HEAD)[None, :])


def _delta(grad: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    b, h, t, dv = out.shape
    delta = out.new_empty((b, h, t), dtype=torch.float32)
    launch(
        delta_kernel,
        triton.cdiv(delta.numel(), DELTA_ROWS),
        out,
        *(grad, out, None if grad_lse is None else grad_lse.contiguous(), delta),
        *(grad.stride(), h, t, delta.numel()),
        VALUE_HEAD=dv,
        BLOCK_DV=triton.next_power_of_2(dv),
        ROWS=DELTA_ROWS,
    )
    return delta


def _sinks_gradient(call: AttentionCall, peak: Tensor, total: Tensor, delta: Tensor) -> Tensor:
    assert call.sinks is not None
    if call.zero_masked_rows:
        peak, total = peak.masked_fill(peak == -float("inf"), 0.0), total.masked_fill(total == 0.0, 1.0)
    weight = torch.exp(call.sinks.float().view(-1, 1) - peak) / total
    return -(weight * delta).sum((0, 2)).to(call.sinks.dtype)


def _options(call: AttentionCall, of: str, dropout_p: float) -> dict[str, Any]:
    """Those of the kernel for the gradient `of` query, key or bias."""
    options = call.options() | {"ZERO_ROWS": call.zero_masked_rows, "DROPOUT": dropout_p}
    dense = call.bias is not None or (call.mask is not None and not options["MASK_OVER_KEYS"])
    longer = max(call.query.shape[-1], call.value.shape[-1])
    shared = reads_shared_memory(call.query.device)
    return options | backward_tile_for(of, longer, call.query.dtype, dense, shared).options()


def _gradients(call: AttentionCall, needs: list[bool]) -> list[Tensor]:
    """Of query, key, value, bias and sinks, unwritten and contiguous; empty where none is needed."""
    given = (call.query, call.key, call.value, call.bias, call.sinks)
    return [
        call.query.new_empty(0) if x is None or not n else x.new_empty(x.shape)
        for x, n in zip(given, needs, strict=True)
    ]


@torch.library.custom_op("effopt_triton::flash_attention_backward", mutates_args=(), schema=SCHEMA)
def _backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, peak: Tensor, total: Tensor, needs: Any, *given: Any
) -> list[Tensor]:
    *given_, dropout_p, seed = given
    call = checked(*given_)
    needs = [needs[0], needs[1] or needs[2], needs[1] or needs[2], *needs[3:]]
    made = _gradients(call, needs)
    if call.query.numel() == 0 or call.key.numel() == 0 or call.value.numel() == 0:
        return [x.zero_() for x in made]
    b, hkv, group, t, _ = call.sizes
    delta = _delta(grad, grad_lse, out)
    query, key, value, bias, mask, _, *ids = call.tensors()
    read = (query, key, value, bias, mask, *ids, seed, grad, peak, total, delta)
    numbers = (*call.strides(), grad.stride(), *call.extent())
    options = {of: _options(call, of, dropout_p) for of in ("query", "key", "bias")}
    if needs[0]:
        programs = b * hkv * triton.cdiv(t * group, options["query"]["ROWS"])
        span = call.lines_in_turn(key.shape[2])
        launch(query_gradient_kernel, programs, query, *read, made[0], *numbers, span, **options["query"])
    if needs[1]:
        key_gradient(call, total, made[1], made[2], read, numbers, options["key"])
    if needs[3] and bias is not None:
        bias_gradient(call, made[3], read, numbers, options["bias"])
    if needs[4] and call.sinks is not None:
        made[4] = _sinks_gradient(call, peak, total, delta)
    return made


@_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, peak: Tensor, total: Tensor, needs: Any, *given: Any
) -> list[Tensor]:
    both = needs[1] or needs[2]
    return _gradients(AttentionCall(*given[:-2]), [needs[0], both, both, *needs[3:]])


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the operands, the result, and the greatest score and sum of weights of each row."""
    out, _, peak, total = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], inputs[-1], out, peak, total)
    ctx.rest = inputs[TENSORS:-1]


def differentiate(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, grad_peak: Any, grad_total: Any
) -> tuple[Any, ...]:
    """Gradients of the forward op's arguments, of those of result and log-sum-exp."""
    if grad_peak is not None or grad_total is not None:
        raise ValueError("greatest scores and sums of weights have no gradient; take that of the log-sum-exp")
    *tensors, seed, out, peak, total = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5)]
    grad = torch.zeros_like(out) if grad is None else grad
    made = _backward(grad, grad_lse, out, peak, total, needs, *tensors, *ctx.rest, seed)
    query, key, value, bias, sinks = (g if n else None for g, n in zip(made, needs, strict=True))
    return (query, key, value, bias, None, sinks, *(None,) * (len(ctx.rest) + 3))
