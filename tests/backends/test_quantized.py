"""The CPU lowerings of quantised linear layers, eager and through Inductor, and what is chosen when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends import int8_products, quantized
from effopt.backends.base import Lowering, choose
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.graph.equivalence import difference
from effopt.graph.ops.base import Op
from effopt.graph.round_to_nearest import quantize_rows
from effopt.graph.tolerances import tolerance_of
from effopt.target import Target, target_of

CPU = target_of(torch.device("cpu"))
BY_NAME = {low.name: low for low in (*quantized.LOWERINGS, *int8_products.LOWERINGS)}
EXACT = pytest.mark.skipif(int8_products.inexact() is not None, reason=str(int8_products.inexact()))
WEIGHT_ONLY = ["dequantize", "reduce", pytest.param("int8-digits", marks=EXACT)]


def operands_of(
    rows: tuple[int, ...],
    k: int,
    n: int,
    *,
    bits: int = 8,
    group: int = 0,
    symmetric: bool = True,
    **given: Any,
) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Arguments of `quantized_linear`, with a bias."""
    dtype = given.get("dtype", torch.float32)
    weight = (torch.randn(n, k) / k**0.5).to(given.get("weight_dtype", dtype))
    packed, scale, *zero = quantize_rows(weight, bits=bits, group=group, symmetric=symmetric)
    args = (
        torch.randn(*rows, k).to(dtype),
        packed,
        scale,
        zero[0] if zero else None,
        torch.randn(n).to(dtype),
    )
    return args, {"bits": bits, "group": group}


def refusal(name: str, args: tuple[Any, ...], kwargs: Any, target: Target = CPU) -> str | None:
    return BY_NAME[name].supports(target, BY_NAME[name].op.bind(args, kwargs))


def assert_values(lowering: Lowering, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
    """Within the table of float64, at the scale of the results."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    got, own = call(*args, **kwargs), lowering.op.reference(*args, **kwargs)
    rtol = tolerance_of(args[0].dtype).rtol
    assert difference(got, own, lowering.op.reference(*wide, **kwargs), rtol, 4 * rtol) == ""


@pytest.mark.parametrize(
    ("rows", "k", "n", "bits", "group", "symmetric", "dtype"),
    [
        ((1,), 256, 70, 4, 128, True, torch.bfloat16),
        ((2, 2), 64, 5, 8, 0, False, torch.float32),
        pytest.param((1, 1), 200, 17, 8, 50, False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param((2,), 130, 17, 4, 16, False, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_through_inductor(
    rows: tuple[int, ...], k: int, n: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    """What is chosen in use is compiled: all lowerings that take the operands give the reference's values."""
    args, kwargs = operands_of(rows, k, n, bits=bits, group=group, symmetric=symmetric, dtype=dtype)
    taken = [low for low in BY_NAME.values() if low.op is ops.quantized_linear]
    taken = [low for low in taken if low.supports(CPU, low.op.bind(args, kwargs)) is None]
    assert "dequantize" in [low.name for low in taken]
    for lowering in taken:
        torch._dynamo.reset()
        assert_values(lowering, torch.compile(lowering.call, dynamic=False, fullgraph=True), args, kwargs)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
@pytest.mark.parametrize("k", [16, 32, 48, 100, 128, 250])
def test_parts_of_a_row(name: str, k: int) -> None:
    """Rows that a step divides by four, by two, and not at all; with several groups and with one."""
    for bits, group in ((8, 0), (8, k // 2), (4, 0), (4, k // 4)):
        for symmetric in (True, False):
            args, kwargs = operands_of((3,), k, 9, bits=bits, group=group, symmetric=symmetric)
            if refusal(name, args, kwargs) is None:
                assert_values(BY_NAME[name], BY_NAME[name].call, args, kwargs)


def test_dequantised_weights_are_those_of_the_reference() -> None:
    """Multiplied with the identity, both give the weights themselves: equal to the bit, block after block."""
    for bits, group, symmetric in ((4, 32, True), (4, 0, False), (8, 64, False), (8, 0, True), (4, 48, True)):
        args, kwargs = operands_of(
            (1,), 128, 30, bits=bits, group=group, symmetric=symmetric, weight_dtype=torch.bfloat16
        )
        eye = torch.eye(128)
        got = BY_NAME["dequantize"].call(eye, *args[1:4], **kwargs)
        assert torch.equal(got, ops.quantized_linear.reference(eye, *args[1:4], **kwargs))


def test_blocks_cover_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the rows: each with its own scales, zeros and bias."""
    monkeypatch.setattr(quantized, "BLOCK_ELEMENTS", 700)
    for group in (0, 20, 40):
        args, kwargs = operands_of((3,), 100, 53, bits=4, group=group, symmetric=False)
        assert_values(BY_NAME["dequantize"], BY_NAME["dequantize"].call, args, kwargs)


def test_rows_may_be_symbolic() -> None:
    """One compiled `dequantize`, and one `int-mm`, serve any number of rows."""
    names = ["dequantize", *(["int8-digits"] if int8_products.inexact() is None else [])]
    for name in names:
        torch._dynamo.reset()
        compiled = torch.compile(BY_NAME[name].call, dynamic=True, fullgraph=True)
        for rows in (2, 40):
            args, kwargs = operands_of((rows,), 64, 20)
            assert_values(BY_NAME[name], compiled, args, kwargs)


@EXACT
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3,), (2, 20)])
@pytest.mark.parametrize(("k", "n"), [(2, 2), (63, 100), (2100, 17)])
def test_integers_to_the_bit(rows: tuple[int, ...], k: int, n: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_bits(BY_NAME["int-mm"].call, rows, k, n, dtype)


@EXACT
@pytest.mark.parametrize("rows", [(1, 1), pytest.param((2, 20), marks=pytest.mark.slow)])
def test_integers_through_inductor(rows: tuple[int, ...]) -> None:
    """One row included, whose codes Inductor gives a stride for which the product is wrong."""
    torch._dynamo.reset()
    compiled = torch.compile(BY_NAME["int-mm"].call, dynamic=False, fullgraph=True)
    assert_bits(compiled, rows, 63, 100, torch.float32)


def assert_bits(call: Callable[..., Any], rows: tuple[int, ...], k: int, n: int, dtype: torch.dtype) -> None:
    (x, packed, scale, _, bias), _ = operands_of(rows, k, n, dtype=dtype)
    packed.random_(0, 256)
    assert torch.equal(call(x, packed, scale, bias), ops.int8_linear.reference(x, packed, scale, bias))


@EXACT
def test_digits_of_rows_with_one_large_element() -> None:
    """What the digits leave of an element is at most 2**-23 of the row's largest."""
    args, kwargs = operands_of((4,), 512, 64)
    x, packed, scale, _, bias = args
    x[:, 7] = 1e6
    exact = ops.quantized_linear.reference(x.double(), packed, scale.double(), None, bias.double(), **kwargs)
    left = (BY_NAME["int8-digits"].call(*args, **kwargs).double() - exact).abs()
    weight = ops.quantized_linear.reference(torch.eye(512).double(), packed, scale.double(), **kwargs)
    assert (left <= 2**-23 * (1e6 * weight.abs().sum(0) + 4 * exact.abs())).all()


@EXACT
def test_rows_without_numbers() -> None:
    """NaN and infinity make their own row NaN, a row of zeros is the bias, and the least numbers stay."""
    args, kwargs = operands_of((5,), 64, 8)
    x, bias = args[0], args[4]
    x[0, 3], x[1, 4], x[2], x[3] = float("nan"), float("inf"), 0.0, 1e-44
    got = BY_NAME["int8-digits"].call(*args, **kwargs)
    assert got[:2].isnan().all()
    assert torch.equal(got[2], bias)
    assert torch.equal(got[3], bias)
    assert got[4].isfinite().all()


def saturating(left: Tensor, right: Tensor) -> Tensor:
    """What a processor without VNNI computes: pairs of products saturate at 16 bits."""
    products = (left.to(torch.int32)[:, :, None] * right.to(torch.int32)[None]).unflatten(1, (-1, 2)).sum(2)
    return products.clamp(-(2**15), 2**15 - 1).sum(1, dtype=torch.int32)


def test_a_processor_that_saturates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    int8_products.inexact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    try:
        args, kwargs = operands_of((2,), 64, 8)
        assert "lacks VNNI" in (refusal("int8-digits", args, kwargs) or "")
        assert "lacks VNNI" in (refusal("int-mm", args[:3], {}) or "")
    finally:
        int8_products.inexact.cache_clear()


REFUSED = {
    "reduce, many rows": ("reduce", ((17,), 64, 8), {"bits": 4}, "beyond 16"),
    "reduce, half a byte": ("reduce", ((2,), 63, 8), {"bits": 4}, "not whole bytes"),
    "reduce, short last group": ("reduce", ((2,), 100, 8), {"group": 64}, "not whole bytes all alike"),
    "reduce, float64": ("reduce", ((2,), 64, 8), {"dtype": torch.float64}, "float64"),
    "reduce, two bits": ("reduce", ((2,), 64, 8), {"bits": 2}, "2 bits"),
    "digits, bfloat16": ("int8-digits", ((2,), 64, 8), {"dtype": torch.bfloat16}, "is as fast"),
    "digits, groups": ("int8-digits", ((2,), 64, 8), {"group": 32}, "one scale"),
    "digits, four bits": ("int8-digits", ((2,), 64, 8), {"bits": 4}, "whole bytes"),
    "digits, one column": ("int8-digits", ((2,), 1, 8), {}, "from 2 rows"),
    "digits, one row of weights": ("int8-digits", ((2,), 64, 1), {}, "from 2 rows"),
    "dequantize, no rows": ("dequantize", ((0,), 64, 8), {}, "is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    name, (rows, k, n), options, expected = REFUSED[case]
    args, kwargs = operands_of(rows, k, n, **options)
    assert expected in (refusal(name, args, kwargs) or "")


def test_other_targets_are_refused() -> None:
    args, kwargs = operands_of((2,), 64, 8)
    for name in ("dequantize", "reduce", "int8-digits"):
        assert "the target is cuda" in (
            refusal(name, args, kwargs, Target("cuda", "sm_90", 4e12, 8e14)) or ""
        )


def chosen(op: Op, rows: int, dtype: torch.dtype, bits: int, group: int) -> str:
    """What is chosen for a 4096 x 1024 layer."""
    with torch._subclasses.FakeTensorMode():
        x, scale = (
            torch.empty(rows, 1024, dtype=dtype),
            torch.empty(4096, 1024 // (group or 1024), dtype=dtype),
        )
        packed = torch.empty(4096, 1024 * bits // 8, dtype=torch.uint8)
        kwargs = {"bits": bits, "group": group} if op is ops.quantized_linear else {}
        operands = op.bind((x, packed, scale), kwargs)
        lowerings = [low for low in BY_NAME.values() if low.op is op] + [reference_lowering(op)]
        return choose(lowerings, CPU, operands, op.fake(x, packed), False).lowering.name


@EXACT
@pytest.mark.skipif(
    not quantized.capabilities().get("amx_int8"), reason="the choice is calibrated with matrix units (AMX)"
)
def test_the_fastest_measured_is_chosen() -> None:
    """Of benchmarks/results/quantized-cpu.json."""
    f32, bf16, weights = torch.float32, torch.bfloat16, ops.quantized_linear
    assert [chosen(weights, rows, f32, 4, 128) for rows in (1, 4, 512)] == ["reduce", "reduce", "dequantize"]
    assert [chosen(weights, rows, bf16, 4, 128) for rows in (1, 16, 512)] == [
        "reduce",
        "reduce",
        "dequantize",
    ]
    assert [chosen(weights, rows, f32, 8, 0) for rows in (4, 16, 512)] == ["int8-digits"] * 3
    assert [chosen(weights, rows, bf16, 8, 0) for rows in (1, 512)] == ["reduce", "dequantize"]
    assert [chosen(ops.int8_linear, rows, bf16, 8, 0) for rows in (1, 16, 512)] == ["int-mm"] * 3
