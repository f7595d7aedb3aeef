"""The kernels on integer weights: values against float64, integers to the bit, order of sums, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends.triton import LOWERINGS, int8_linear, quantized_linear
from effopt.backends.triton.int8_linear import INT8_LINEAR
from effopt.backends.triton.quantized_linear import QUANTIZED_LINEAR, MatrixTile
from effopt.graph import ops
from effopt.graph.equivalence import difference
from effopt.graph.ops import Sample
from effopt.graph.ops.int8_linear import quantize_tokens
from effopt.graph.round_to_nearest import quantize_rows
from effopt.graph.tolerances import tolerance_of
from effopt.target import Target
from tests.backends.triton.calls import H100, double

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def sample_of(
    rows: tuple[int, ...], k: int, n: int, device: Any, *, bits: int = 4, group: int = 0, **given: Any
) -> Sample:
    """A call of `quantized_linear` on weights of the size that layers have."""
    dtype, symmetric = given.get("dtype", torch.float32), given.get("symmetric", True)
    weight = (torch.randn(n, k, device=device) / max(1, k) ** 0.5).to(dtype)
    packed, scale, *zero = quantize_rows(weight, bits=bits, group=group, symmetric=symmetric)
    x = torch.randn(*rows, k, device=device, dtype=dtype)
    bias = torch.randn(n, device=device, dtype=dtype)
    return Sample((x, packed, scale, zero[0] if zero else None, bias), {"bits": bits, "group": group})


def assert_values(sample: Sample) -> None:
    """Within the table of float64, at the scale of the results: sums of products of either sign cancel."""
    got = QUANTIZED_LINEAR.run(*sample.args, **sample.kwargs)
    own = ops.quantized_linear.reference(*sample.args, **sample.kwargs)
    exact = ops.quantized_linear.reference(*widened(sample), **sample.kwargs)
    rtol = tolerance_of(sample.args[0].dtype).rtol
    assert difference(got, own, exact, rtol, 4 * rtol) == ""
    assert got.is_contiguous()


def widened(sample: Sample) -> tuple[Any, ...]:
    """Floating operands in float64; codes and zeros stay what they are."""
    floats = (a.is_floating_point() if isinstance(a, Tensor) else False for a in sample.args)
    return tuple(double(a) if f else a for a, f in zip(sample.args, floats, strict=True))


@every_dtype
def test_samples(dtype: torch.dtype, device: torch.device) -> None:
    for sample in ops.quantized_linear.samples(dtype, device):
        assert_values(sample)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "k", "n"), [((1,), 1, 1), ((63,), 100, 63), ((2, 50), 63, 100), ((17,), 65, 65)]
)
@pytest.mark.parametrize(("group", "symmetric"), [(0, True), (0, False), (16, False), (64, True), (7, False)])
def test_odd_sizes(
    bits: int, rows: tuple[int, ...], k: int, n: int, group: int, symmetric: bool, device: torch.device
) -> None:
    """Sizes that fill no tile, and groups that begin inside a tile, inside a byte, or end short."""
    if group <= k:
        assert_values(sample_of(rows, k, n, device, bits=bits, group=group, symmetric=symmetric))


@pytest.mark.parametrize("bits", [4, 8])
def test_layouts(bits: int, device: torch.device) -> None:
    sample = sample_of((6,), 40, 24, device, bits=bits, group=8, symmetric=False)
    for x in (
        torch.randn(40, 6, device=device).t(),
        torch.randn(6, 80, device=device)[:, ::2],
        torch.randn(1, 40, device=device).expand(6, 40),
        torch.randn(2, 40, 3, device=device).transpose(1, 2),
    ):
        assert_values(Sample((x, *sample.args[1:]), sample.kwargs))
    turned = [a.t().contiguous().t() if a.dim() == 2 else a[::1] for a in sample.args]
    assert_values(Sample(tuple(turned), sample.kwargs))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_k_divided_among_programs(rows: int, device: torch.device) -> None:
    """Parts of unequal length, the last beyond k, give the sums of one program, and bits that repeat."""
    for bits, group in ((4, 0), (4, 48), (8, 32)):
        sample = sample_of((rows,), 1500, 33, device, bits=bits, group=group)
        tile = quantized_linear.tile_for(rows, torch.float32)
        splits = tile.splits(rows, 33, 1500)
        assert splits > 1
        assert tile.steps(1500, splits) * splits * tile.depth > 1500
        assert_values(sample)
        first, second = (QUANTIZED_LINEAR.run(*sample.args, **sample.kwargs) for _ in range(2))
        assert torch.equal(first, second)


def test_tiles_cover_the_product() -> None:
    tile = MatrixTile(16, 64, 64)
    assert tile.programs(17, 65) == 4
    assert tile.splits(1, 64, 64) == 1
    assert tile.splits(1, 64, 64 * 40) == 10
    assert tile.splits(16, 64 * 256, 4096) == 1
    for k, splits in ((4096, 3), (1, 1), (100, 2)):
        assert tile.steps(k, splits) * splits * tile.depth >= k


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under the interpreter, warns of inf - inf
def test_nan_and_infinity_stay_in_their_row(device: torch.device) -> None:
    for bits in (4, 8):
        sample = sample_of((6,), 70, 20, device, bits=bits, group=32)
        x = sample.args[0]
        x[1, 3], x[2, 4], x[3, 69], x[4] = float("nan"), float("inf"), float("-inf"), 0.0
        assert_values(sample)


@every_dtype
def test_integers_to_the_bit(dtype: torch.dtype, device: torch.device) -> None:
    for sample in ops.int8_linear.samples(dtype, device):
        assert_bits(sample)


def assert_bits(sample: Sample) -> None:
    """The op's own bits; but Triton's interpreter rounds float32 to bfloat16 towards zero."""
    got = INT8_LINEAR.run(*sample.args, **sample.kwargs)
    expected = ops.int8_linear.reference(*sample.args, **sample.kwargs)
    assert got.dtype == expected.dtype
    if got.dtype == torch.bfloat16 and got.device.type == "cpu":
        wide = ops.int8_linear.reference(sample.args[0].float(), *sample.args[1:])
        towards_zero = (wide.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)
        expected = torch.where(got == expected, expected, towards_zero)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("rows", "k", "n"), [((1,), 1, 1), ((63,), 100, 63), ((3, 21), 1030, 5), ((2,), 2100, 65)]
)
def test_integers_of_odd_sizes(rows: tuple[int, ...], k: int, n: int, device: torch.device) -> None:
    packed = torch.randint(0, 256, (n, k), dtype=torch.uint8, device=device)
    x, scale = torch.randn(*rows, k, device=device), torch.rand(n, 1, device=device)
    bias = torch.randn(n, device=device)
    assert_bits(Sample((x, packed, scale, bias), {}))
    assert_bits(Sample((x.mT.contiguous().mT if x.dim() > 1 else x, packed, scale), {}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_integers_of_ties_extremes_and_no_numbers(device: torch.device) -> None:
    """Halves go to the even code, sums do not overflow, a token with NaN or infinity gives NaN."""
    x = torch.arange(-127, 128, device=device, dtype=torch.float32)[None].repeat(7, 1) / 2
    x[0, 0], x[1, 0], x[1, 1:] = 127.0, 127.0, 63.5
    x[2, 5], x[3, 5], x[4], x[5] = float("nan"), float("inf"), 0.0, 1e-42
    packed = torch.zeros(9, 255, dtype=torch.uint8, device=device)
    packed[::2] = 255
    sample = Sample((x, packed, torch.ones(9, 1, device=device)), {})
    assert_bits(sample)
    got = INT8_LINEAR.run(*sample.args)
    assert got[2:4].isnan().all()
    assert not got[[0, 1, 4, 5, 6]].isnan().any()


def test_quantised_tokens_are_those_of_the_op(device: torch.device) -> None:
    for x in (torch.randn(5, 3000, device=device), torch.randn(9, 63, device=device) * 1e-30):
        codes, scale = int8_linear._quantize_tokens(x)
        expected, expected_scale = quantize_tokens(x)
        assert torch.equal(codes.float(), expected)
        assert torch.equal(scale[:, None], expected_scale)


@pytest.mark.parametrize("lowering", [QUANTIZED_LINEAR, INT8_LINEAR], ids=lambda lowering: lowering.op.name)
def test_opcheck(lowering: Any, device: torch.device) -> None:
    """Schema, fake kernel, and AOTAutograd with dynamic shapes."""
    op = getattr(torch.ops.effopt_triton, lowering.op.name).default
    x, packed, scale, zero, bias = sample_of((3, 4), 48, 24, device, bits=8).args
    if lowering is QUANTIZED_LINEAR:
        torch.library.opcheck(op, (x, packed, scale, zero, bias, 8, 0))
    else:
        torch.library.opcheck(op, (x, int8_linear.signed(packed), scale, bias))


X, P, S = torch.zeros(2, 3, 8), torch.zeros(5, 8, dtype=torch.uint8), torch.zeros(5, 1)
REFUSED = {
    "bits": (QUANTIZED_LINEAR, (X, P, S), {"bits": 2, "group": 0}, "codes of 2 bits"),
    "packed of another length": (QUANTIZED_LINEAR, (X, P, S), {"bits": 4, "group": 0}, "packed is [5, 8]"),
    "one scale for groups": (QUANTIZED_LINEAR, (X, P, S), {"bits": 8, "group": 4}, "wants [5, 2]"),
    "zeros of one group": (
        QUANTIZED_LINEAR, (X, P, S.expand(5, 2), P[:, :1]), {"bits": 8, "group": 4}, "zero is [5, 1]",
    ),
    "zeros in float": (QUANTIZED_LINEAR, (X, P, S, S), {"bits": 8, "group": 0}, "zero is torch.float32"),
    "bias of another length": (
        QUANTIZED_LINEAR, (X, P, S, None, S[:3, 0]), {"bits": 8, "group": 0}, "bias is [3]",
    ),
    "float64": (QUANTIZED_LINEAR, (X.double(), P, S), {"bits": 8, "group": 0}, "float64"),
    "float64 scales": (INT8_LINEAR, (X, P, S.double()), {}, "float64"),
    "input of another length": (INT8_LINEAR, (X[..., :7], P, S), {}, "wants 8 in a row"),
    "scales of groups": (INT8_LINEAR, (X, P, S.expand(5, 2)), {}, "scale is [5, 2]"),
    "long rows": (
        INT8_LINEAR, (X[..., :1].expand(2, 3, 131072), P[:, :1].expand(5, 131072), S), {}, "at most 131071",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_says_why_and_the_call_raises(case: str) -> None:
    lowering, args, kwargs, expected = REFUSED[case]
    assert expected in (lowering.supports(H100, lowering.op.bind(args, kwargs)) or "")
    with pytest.raises(ValueError, match="wants"):
        lowering.run(*args, **kwargs)


def test_targets_dtypes_and_empty() -> None:
    for lowering in (QUANTIZED_LINEAR, INT8_LINEAR):
        kwargs = {"bits": 8, "group": 0} if lowering is QUANTIZED_LINEAR else {}
        bound = lowering.op.bind((X, P, S), kwargs)
        assert lowering.supports(H100, bound) is None
        assert "no compiled Triton" in (lowering.supports(Target("cpu", "cpu", 1e10, 1e11), bound) or "")
        assert "is empty" in (lowering.supports(H100, bound | {"input": X[:0]}) or "")
        assert "float8" in (lowering.supports(H100, bound | {"input": X.to(torch.float8_e4m3fn)}) or "")
        assert 0 < lowering.cost(H100, bound, torch.zeros(2, 3, 5)) < 1e-5


def test_unsigned_codes_are_not_taken_for_signed_ones() -> None:
    with pytest.raises(TypeError, match=r"expected torch\.int8, the layout of `signed`, got torch\.uint8"):
        INT8_LINEAR.call(X, P, S)


def test_both_are_registered() -> None:
    assert {QUANTIZED_LINEAR, INT8_LINEAR} <= {low for low in LOWERINGS if not low.differentiable}


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("rows", [1, 16, 333])
def test_large_on_gpu(rows: int, dtype: torch.dtype) -> None:
    """Sizes of real models, compiled."""
    for bits, group in ((4, 128), (8, 0)):
        assert_values(sample_of((rows,), 4096, 2048, "cuda", bits=bits, group=group, dtype=dtype))
    x, packed, scale, _, bias = sample_of((rows,), 4096, 2048, "cuda", bits=8, dtype=dtype).args
    assert_bits(Sample((x, packed, scale, bias), {}))
