"""`scaled_dot_product_attention` as a lowering: equal to the op for every mask that it accepts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from effopt.backends.native import LOWERINGS
from effopt.graph import ops
from effopt.target import target_of

SDPA, WITH_BIAS = LOWERINGS
CPU = target_of(torch.device("cpu"))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def masks(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    keep = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    keep[0, 0, 2] = False
    lowest = torch.finfo(dtype).min
    bias = torch.randn(4, 5, 7, dtype=dtype)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"mask": keep},
        "bool, -inf": {"mask": keep, "fill": -math.inf},
        "bool, lowest": {"mask": keep, "fill": lowest},
        "bool, -1e9": {"mask": keep, "fill": -1e9},
        "bool, 2-D": {"mask": keep[0, 0]},
        "bool, 3-D": {"mask": keep[0]},
        "bool, zero rows": {"mask": keep, "zero_masked_rows": True},
        "bool, lowest, no zero rows": {"mask": keep, "fill": lowest, "zero_masked_rows": True},
        "bias": {"bias": bias},
        "bias, -inf": {"bias": torch.where(keep, bias, -math.inf)},
        "bias, zero rows": {"bias": torch.where(keep, bias, -math.inf), "zero_masked_rows": True},
        "bias and bool": {"bias": bias, "mask": keep},
        "bias and bool, lowest": {"bias": bias, "mask": keep, "fill": lowest},
        "key bias": {"bias": torch.where(keep[:, :, 3:4], 0.0, -math.inf).to(dtype)},
    }


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", masks(torch.float32))
def test_equals_reference(name: str, dtype: torch.dtype, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, dtype=dtype) for h, n in ((4, 5), (kv_heads, 7), (kv_heads, 7)))
    kwargs = {"scale": 0.3, **masks(dtype)[name]}
    careful = "bias" in kwargs and not kwargs.get("zero_masked_rows")
    chosen, other = (WITH_BIAS, SDPA) if careful else (SDPA, WITH_BIAS)
    bound = ops.attention.bind((q, k, v), kwargs)
    assert other.supports(CPU, bound) is not None
    reason = chosen.supports(CPU, bound)
    if dtype == torch.float16 and "lowest" in name:
        assert reason is not None
        assert "fill with -inf" in reason
        return
    assert reason is None
    got, wanted = SDPA.call(q, k, v, **kwargs), ops.attention.reference(q, k, v, **kwargs)
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 2, 2, 5, 8)], ids=str)
def test_other_ranks(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(shape) for _ in range(3))
    assert SDPA.supports(CPU, ops.attention.bind((q, k, v), {"scale": 0.3})) is None
    torch.testing.assert_close(
        SDPA.call(q, k, v, scale=0.3), ops.attention.reference(q, k, v, scale=0.3), rtol=1e-5, atol=1e-5
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "soft-cap": ({"softcap": 5.0}, "no soft-cap"),
    "sinks": ({"sinks": torch.zeros(4)}, "no sinks"),
    "dropout": ({"dropout_p": 0.1}, "no dropout"),
    "causal and mask": ({"is_causal": True, "mask": torch.ones(5, 5, dtype=torch.bool)}, "takes one"),
    "small fill": ({"mask": torch.ones(5, 5, dtype=torch.bool), "fill": -1e4}, "fill with -inf"),
    "bias in training": ({"bias": torch.zeros(5, 5)}, "no gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name: str) -> None:
    kwargs, reason = REFUSED[name]
    q = torch.randn(2, 4, 5, 8)
    said = SDPA.supports(CPU, ops.attention.bind((q, q, q), {"scale": 1.0, **kwargs}))
    assert said is not None
    assert reason in said


def test_a_bias_is_taken_without_gradients_only() -> None:
    """The kernel's backward recomputes weights of 1 for a row that a finite bias hides (torch 2.13, CPU)."""
    assert SDPA.differentiable
    assert not WITH_BIAS.differentiable
