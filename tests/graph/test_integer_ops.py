"""Ops on small integers: sums are exact, and what is computed is what the definition says, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from effopt.graph import ops
from effopt.graph.ops.int8_linear import quantize_tokens
from effopt.graph.packing import pack
from effopt.graph.round_to_nearest import dequantize, quantize_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
aten = torch.ops.aten


def int64_linear(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`int8_linear` with its products and sums in int64, one token at a time."""
    out = []
    for token in x.reshape(-1, x.shape[-1]).float():
        most = token.abs().max() if len(token) else torch.tensor(0.0)
        step = most * torch.tensor(1.0 / 127.0, dtype=torch.float32)
        step = step if step else torch.tensor(1.0)
        codes = (token / step).round().clamp(-127, 127).long()
        sums = (packed.long() - 128) @ codes
        out.append(sums.float() * step * scale[:, 0].float())
    result = torch.stack(out) if out else torch.empty(0, packed.shape[0])
    result = result if bias is None else result + bias.float()
    return result.to(x.dtype).reshape(*x.shape[:-1], packed.shape[0])


@given(
    dtype=st.sampled_from(DTYPES), rows=st.lists(st.integers(0, 4), max_size=2), n=st.integers(1, 9),
    k=st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 2500, 4096])), has_bias=st.booleans(),
    scale=st.sampled_from([1.0, 1e-6, 1e4]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_integer_sums_are_exact(
    dtype: torch.dtype, rows: list[int], n: int, k: int, has_bias: bool, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*rows, k, generator=generator) * scale).to(dtype)
    packed, scales = quantize_rows(
        torch.randn(n, k, generator=generator).to(dtype), bits=8, group=0, symmetric=True
    )
    bias = torch.randn(n, generator=generator).to(dtype) if has_bias else None
    got = torch.ops.effopt.int8_linear(x, packed, scales, bias)
    want = int64_linear(x, packed, scales, bias)
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("k", [1024, 1025, 131072])
def test_the_largest_sums_are_exact(k: int) -> None:
    """All codes at their ends and of one sign: float32 alone would round these."""
    x = torch.full((2, k), 3.0)
    x[1, 1::2] = -3.0
    packed = torch.full((3, k), 255, dtype=torch.uint8)
    packed[1] = 0
    packed[2, ::3] = 1
    scale = torch.ones(3, 1)
    assert torch.equal(torch.ops.effopt.int8_linear(x, packed, scale), int64_linear(x, packed, scale, None))


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.randn(5, 16)
    x[1], x[2, 3], x[3, 0] = 0, float("nan"), float("inf")
    x[4] *= 1e-44
    packed, scale = quantize_rows(torch.randn(4, 16), bits=8, group=0, symmetric=True)
    out = torch.ops.effopt.int8_linear(x, packed, scale)
    assert out[0].isfinite().all()
    assert (out[1] == 0).all()
    assert out[2].isnan().all()
    assert out[3].isnan().all()
    assert out[4].isfinite().all()


@given(x=st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_tokens_move_by_half_a_step(x: list[float]) -> None:
    token = torch.tensor(x)
    codes, scale = quantize_tokens(token)
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= 127
    assert ((codes.double() * scale.double() - token.double()).abs() <= 0.5001 * scale.double()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, 0, True), (4, 32, True), (4, 48, False)])
def test_weight_only_is_linear_with_the_rounded_weight(
    dtype: torch.dtype, bits: int, group: int, symmetric: bool
) -> None:
    x, weight, bias = (
        torch.randn(3, 5, 101).to(dtype),
        torch.randn(24, 101).to(dtype),
        torch.randn(24).to(dtype),
    )
    packed, scale, *zero = quantize_rows(weight, bits=bits, group=group, symmetric=symmetric)
    at = zero[0] if zero else None
    got = torch.ops.effopt.quantized_linear(x, packed, scale, at, bias, bits=bits, group=group)
    rounded = dequantize(packed, scale, at, bits=bits, group=group, length=101).to(dtype)
    assert torch.equal(got, F.linear(x, rounded, bias))
    rows = torch.ops.effopt.quantized_embedding(
        torch.tensor([[0, 23], [5, 5]]), packed, scale, at, bits=bits, group=group, width=101
    )
    assert torch.equal(rows, rounded[torch.tensor([[0, 23], [5, 5]])])


def test_compiled_sums_are_the_same_to_the_bit() -> None:
    """Inductor inlines the reference; its own order of float32 additions must not show."""
    packed, scale = quantize_rows(torch.randn(40, 1500), bits=8, group=0, symmetric=True)
    x, bias = torch.randn(6, 1500), torch.randn(40)
    compiled = torch.compile(lambda x: ops.int8_linear.reference(x, packed, scale, bias))
    assert torch.equal(compiled(x), int64_linear(x, packed, scale, bias))


@pytest.mark.parametrize(("bits", "group", "k"), [(4, 32, 33), (8, 48, 112), (4, 16, 63), (4, 16, 64)])
def test_compiled_groups_that_do_not_divide(bits: int, group: int, k: int) -> None:
    """Inductor 2.13 gives other numbers for a slice of an expanded scale that a product reads."""
    x, weight = torch.randn(2, 7, k), torch.randn(40, k)
    packed, scale, zero = quantize_rows(weight, bits=bits, group=group, symmetric=False)

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.quantized_linear.reference(x, packed, scale, zero, bits=bits, group=group)

    torch.testing.assert_close(torch.compile(run)(x), run(x))


def test_a_packed_weight_may_have_any_strides() -> None:
    weight = torch.randn(10, 30)
    packed, scale = quantize_rows(weight, bits=4, group=8, symmetric=True)
    x = torch.randn(2, 30)
    args = {"bits": 4, "group": 8}
    turned = packed.t().contiguous().t()
    assert torch.equal(
        torch.ops.effopt.quantized_linear(x, packed, scale, **args),
        torch.ops.effopt.quantized_linear(x, turned, scale, **args),
    )
    assert torch.equal(pack(torch.zeros(2, 3), 8), torch.zeros(2, 3, dtype=torch.uint8))
