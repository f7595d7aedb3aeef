"""Every custom op of the kernels is what torch is told of it: schema, fake result with strides, autograd."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef

from effopt.backends.triton import (
    block_sparse_attention,
    decode_attention,
    flash_attention,
    flash_attention_backward,
    glu,
    int8_linear,
    layer_norm,
    linear_attention,
    linear_attention_backward,
    paged_attention,
    quantized_linear,
    rms_norm,
    rope,
    selective_scan,
    stream_k_attention,
    unified_max_attention,
)
from effopt.backends.triton.attention_refusals import prepare
from effopt.graph import ops
from effopt.graph.round_to_nearest import quantize_rows
from tests.backends.triton.attention_cases import heads
from tests.backends.triton.conftest import KERNEL_MODULES

Draw = Callable[..., Tensor]


def attention_operands(draw: Draw, t: int, **more: Any) -> tuple[Any, ...]:
    made = heads(t, 17, 16, draw(1).device, h=2, hkv=1)
    return prepare(ops.attention.bind(made, {"scale": 0.3, "high": 17 - t, **more}))


def attention_gradient(draw: Draw) -> tuple[Any, ...]:
    given = attention_operands(draw, 5, bias=draw(1, 2, 1, 17), sinks=draw(2))
    out, lse, peak, total = flash_attention._flash_attention(*given, 0.0, None)
    return (torch.ones_like(out), torch.ones_like(lse), out, peak, total, [True] * 5, *given, 0.0, None)


def chosen_blocks(draw: Draw) -> tuple[Any, ...]:
    q, k, v = heads(20, 20, 16, draw(1).device, h=2, hkv=1)
    return q, k, v, draw(1, 1, 2, 2) < 9.0, 16, 0.3, True, 0.0, None, True


def pages(draw: Draw) -> tuple[Any, ...]:
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=draw(1).device)
    lengths = torch.tensor([11], dtype=torch.int32, device=table.device)
    return draw(1, 2, 1, 16), draw(3, 1, 8, 16), draw(3, 1, 8, 16), table, lengths


def linear(draw: Draw) -> tuple[Any, ...]:
    q, k, v = (draw(1, 9, 2, 16).transpose(1, 2) for _ in range(3))
    return q, k, v, -draw(1, 2, 9).exp(), draw(1, 2, 16, 16), 0.3


def packed(draw: Draw, bits: int) -> tuple[Any, ...]:
    codes, scale, *_ = quantize_rows(draw(8, 32), bits=bits, group=0, symmetric=True)
    return draw(3, 32), codes, scale


def scan(draw: Draw) -> tuple[Any, ...]:
    return draw(1, 4, 9), draw(1, 4, 9).sigmoid(), -draw(4, 4).exp(), draw(1, 4, 9), draw(1, 4, 9), None


def scan_gradient(draw: Draw) -> tuple[Any, ...]:
    *given, start = scan(draw)
    out, _, kept = selective_scan._scan(*given, start)
    return torch.ones_like(out), None, *given, kept


def turned(draw: Draw) -> tuple[Any, ...]:
    angle = draw(1, 1, 5, 8)
    return draw(1, 5, 2, 8).transpose(1, 2), angle.cos(), angle.sin(), False


def by_layer(draw: Draw) -> Tensor:
    """Rows with gaps, as the halves of a projection have."""
    return draw(3, 40)[:, :20]


CALLS: dict[CustomOpDef, Callable[[Draw], tuple[Any, ...]]] = {
    flash_attention._flash_attention: lambda draw: (*attention_operands(draw, 5), 0.0, None),
    flash_attention_backward._backward: attention_gradient,
    decode_attention._decode_attention: lambda draw: attention_operands(draw, 1),
    stream_k_attention._stream_k_attention: lambda draw: attention_operands(draw, 1),
    unified_max_attention._unified_max_attention: lambda draw: attention_operands(draw, 1),
    block_sparse_attention._forward: chosen_blocks,
    paged_attention._forward: pages,
    linear_attention.linear_attention_forward: linear,
    linear_attention_backward._backward: lambda draw: (draw(1, 2, 9, 16), draw(1, 2, 16, 16), *linear(draw)),
    rms_norm._rms_norm: lambda draw: (by_layer(draw), draw(20), 1e-6, 0.0, False),
    rms_norm._add_rms_norm: lambda draw: (by_layer(draw), draw(3, 20), draw(20), 1e-6, 0.0, False),
    rms_norm._rms_norm_backward: lambda draw: (
        *(draw(3, 20), None, by_layer(draw), draw(20)),
        *(1e-6, 0.0, False, True),
    ),
    layer_norm._layer_norm: lambda draw: (by_layer(draw), draw(20), draw(20), 1e-6),
    layer_norm._add_layer_norm: lambda draw: (by_layer(draw), draw(3, 20), draw(20), None, 1e-6),
    layer_norm._layer_norm_backward: lambda draw: (
        *(draw(3, 20), draw(3, 20), by_layer(draw), draw(20)),
        *(1e-6, True, True),
    ),
    glu._glu: lambda draw: (by_layer(draw), draw(3, 20), "silu"),
    glu._glu_backward: lambda draw: (draw(3, 20), by_layer(draw), draw(3, 20), "gelu"),
    rope._rope: turned,
    rope._rope_backward: turned,
    quantized_linear._quantized_linear: lambda draw: (*packed(draw, 4), None, draw(8), 4, 0),
    int8_linear._int8_linear: lambda draw: (
        *(x if x.dtype != torch.uint8 else int8_linear.signed(x) for x in packed(draw, 8)),
        draw(8),
    ),
    selective_scan._scan: scan,
    selective_scan._scan_backward: scan_gradient,
}


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op._opoverload._schema.name.partition("::")[2])
def test_opcheck(op: CustomOpDef, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_k_attention, "PROGRAMS", 3)
    given = CALLS[op](lambda *sizes: torch.randn(sizes, device=device))
    named = {"scale": 0.3} if op is paged_attention._forward else {}
    torch.library.opcheck(op, given, named)


def test_every_op_is_checked() -> None:
    found = (x for name in KERNEL_MODULES for x in vars(import_module(name)).values())
    assert {op for op in found if isinstance(op, CustomOpDef)} == set(CALLS)
