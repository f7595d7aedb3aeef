"""Small integers in bytes, and weights as small integers: nothing is lost but what rounding loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effopt.graph.packing import WIDTHS, pack, packed_length, unpack
from effopt.graph.round_to_nearest import (
    dequantize,
    group_count,
    quantize_rows,
    quantized_bytes,
    round_to_nearest,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
seeds = st.integers(0, 2**31)


@given(
    bits=st.sampled_from(WIDTHS),
    shape=st.lists(st.integers(0, 9), max_size=2),
    k=st.integers(0, 67),
    seed=seeds,
)
def test_packing_round_trips(bits: int, shape: list[int], k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (*shape, k), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, packed_length(k, bits))
    assert torch.equal(unpack(packed, bits, k), codes)


@pytest.mark.parametrize("bits", [b for b in range(10) if b not in WIDTHS])
def test_other_widths_are_refused(bits: int) -> None:
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    for call in (lambda: pack(codes, bits), lambda: unpack(codes, bits, 3)):
        with pytest.raises(ValueError, match=f"codes of {bits} bits"):
            call()


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1]), 1).tolist() == [0b10001101, 1]
    assert pack(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00111001, 2]


def by_hand(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """One weight at a time, in Python, with float32 numbers."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = torch.empty_like(weight, dtype=wide)
    size = group or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            w = weight[row, start : start + size].to(wide)
            if symmetric:
                most, zero = 2 ** (bits - 1) - 1, torch.tensor(0.0)
                scale = (w.abs().max() / most).to(weight.dtype).to(wide)
                least = -most
            else:
                low, high = min(w.min(), torch.tensor(0.0)), max(w.max(), torch.tensor(0.0))
                scale = ((high - low) / (2**bits - 1)).to(weight.dtype).to(wide)
                scale = scale if scale else torch.tensor(1.0)
                zero = (-low / scale).round().clamp(0, 2**bits - 1)
                least, most = -int(zero), 2**bits - 1 - int(zero)
            scale = scale if scale else torch.tensor(1.0)
            for i, value in enumerate(w):
                code = min(max(int((value / scale).round()), least), most)
                out[row, start + i] = code * scale
    return out


@given(
    bits=st.sampled_from((4, 8)), symmetric=st.booleans(), dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 3), k=st.integers(1, 21), group=st.integers(0, 23), seed=seeds,
    kind=st.sampled_from(("normal", "zeros", "positive", "tiny", "outlier")),
)  # fmt: skip
def test_quantised_weights_are_those_computed_by_hand(
    bits: int, symmetric: bool, dtype: torch.dtype, n: int, k: int, group: int, seed: int, kind: str
) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    weight = {
        "normal": weight,
        "zeros": weight * 0,
        "positive": weight.abs() + 1,
        "tiny": weight * 1e-7,
        "outlier": torch.where(torch.arange(k) == k // 2, 1e4, weight),
    }[kind].to(dtype)
    packed, scale, *zero = quantize_rows(weight, bits=bits, group=group, symmetric=symmetric)
    assert scale.dtype == dtype
    assert scale.shape == (n, group_count(k, group))
    assert (len(zero) == 0) is symmetric
    stored = sum(t.numel() * t.element_size() for t in (packed, scale, *zero))
    assert stored == quantized_bytes(n, k, scale.element_size(), bits=bits, group=group, symmetric=symmetric)
    got = dequantize(packed, scale, zero[0] if zero else None, bits=bits, group=group, length=k)
    assert torch.equal(got, by_hand(weight, bits, group, symmetric))


@given(bits=st.sampled_from((4, 8)), symmetric=st.booleans(), k=st.integers(1, 40), seed=seeds)
def test_a_weight_moves_by_half_a_step(bits: int, symmetric: bool, k: int, seed: int) -> None:
    weight = torch.randn(3, k, generator=torch.Generator().manual_seed(seed))
    packed, scale, *zero = quantize_rows(weight, bits=bits, group=8, symmetric=symmetric)
    got = dequantize(packed, scale, zero[0] if zero else None, bits=bits, group=8, length=k)
    steps = scale.repeat_interleave(8, 1)[:, :k]
    # A zero point is itself rounded, which can push the end of a range half a step out of the codes.
    assert ((got - weight).abs() <= steps * (0.5 if symmetric else 1.0) * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_group_that_is_not_finite_is_nan_and_the_others_are_not(
    value: float, bits: int, symmetric: bool
) -> None:
    weight = torch.randn(2, 16)
    weight[1, 3] = value
    packed, scale, *zero = quantize_rows(weight, bits=bits, group=8, symmetric=symmetric)
    got = dequantize(packed, scale, zero[0] if zero else None, bits=bits, group=8, length=16)
    assert got[1, :8].isnan().all()
    assert got[0].isfinite().all()
    assert got[1, 8:].isfinite().all()


def test_zeros_and_identical_weights_are_exact() -> None:
    for symmetric in (True, False):
        for value in (0.0, 1.0, -3.0):
            weight = torch.full((2, 10), value)
            packed, scale, *zero = quantize_rows(weight, bits=8, group=4, symmetric=symmetric)
            got = dequantize(packed, scale, zero[0] if zero else None, bits=8, group=4, length=10)
            torch.testing.assert_close(got, weight, rtol=1e-6, atol=0)


def test_rows_quantised_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 24)
    whole = quantize_rows(weight, bits=4, group=8, symmetric=False)
    monkeypatch.setattr("effopt.graph.round_to_nearest._MOST_ELEMENTS", 100)
    pieces = quantize_rows(weight, bits=4, group=8, symmetric=False)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_an_empty_weight_has_one_empty_group() -> None:
    codes, scale, zero = round_to_nearest(torch.empty(3, 0), bits=4)
    assert (codes.shape, scale.shape, zero) == ((3, 0), (3, 1), None)
