"""One maximum for all parts of a decode, and the exact kernels for the rows that it does not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends.base import choose
from effopt.backends.triton import decode_attention, unified_max_attention
from effopt.backends.triton.attention_refusals import prepare
from effopt.backends.triton.attention_tiles import AttentionCall
from effopt.backends.triton.decode_attention import DECODE_ATTENTION
from effopt.backends.triton.flash_attention import outputs
from effopt.backends.triton.unified_max_attention import UNIFIED_MAX_ATTENTION, attend_unified
from effopt.graph import ops
from effopt.graph.equivalence import difference
from effopt.graph.tolerances import tolerance_of
from tests.backends.triton.attention_cases import DTYPES, LEAST, heads, kinds
from tests.backends.triton.calls import H100, double

# Overflow is how a row shows that the maximum does not fit; NumPy, by which Triton interprets, warns of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning"
)
SOME = (
    "causal, last rows aligned", "window", "empty band", "band, filled", "mask", "mask of all keys, filled",
    "blind", "blind, zero", "blind, filled", "filled near the scores", "bias", "bias of the least",
    "bias of minus infinity", "packed", "soft-cap", "sinks, blind", "sinks of the least", "all at once",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_keys_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "parts", lambda tiles, keys: max(1, min(4, keys // 5)))


def marked(args: tuple[Tensor, ...], **named: Any) -> Tensor:
    """Rows `[b, h, t]` that the first two kernels leave to the exact ones."""
    call = AttentionCall(*prepare(ops.attention.bind(args, named)))
    out, lse = outputs(call)
    sums = out.new_empty((3, *out.shape), dtype=torch.float32)
    redo = torch.empty(lse.shape, dtype=torch.int8, device=lse.device)
    attend_unified(call, out, lse, sums, lse.new_empty((3, *lse.shape)), redo)
    return redo.bool()


def assert_values(args: tuple[Tensor, ...], **named: Any) -> None:
    got = UNIFIED_MAX_ATTENTION.call(*args, **named)
    own = ops.attention.reference(*args, **named)
    wide = {k: double(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in named.items()}
    exact = ops.attention.reference(*map(double, args), **wide)
    rtol = tolerance_of(args[0].dtype).rtol
    assert difference(got, own, exact, rtol, 4 * rtol) == ""


@pytest.mark.parametrize("kind", SOME)
def test_kinds_of_masks(kind: str, device: torch.device) -> None:
    t, s = 9, 65
    assert_values(heads(t, s, 16, device), scale=0.3, **kinds(t, s, device)[kind])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("s", [1, 5, 100])
def test_ordinary_rows_are_not_done_again(dtype: torch.dtype, s: int, device: torch.device) -> None:
    args = heads(1, s, 24, device, b=2, h=4, hkv=2, dtype=dtype, dv=17)
    assert not marked(args, scale=0.2).any()
    assert_values(args, scale=0.2)


def scores_of(levels: list[float], s: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A call of scale 1 whose row i has scores from `levels[i] - 1` to `levels[i]`."""
    q = torch.zeros(1, 1, len(levels), 8, dtype=dtype, device=device)
    q[..., 0], q[..., 1] = torch.tensor(levels, dtype=dtype, device=device), 1.0
    k = torch.zeros(1, 1, s, 8, dtype=dtype, device=device)
    k[..., 0], k[..., 1] = 1.0, torch.linspace(-1.0, 0.0, s, device=device).to(dtype)
    return q, k, torch.randn(1, 1, s, 8, device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_rows_that_one_maximum_does_not_fit(dtype: torch.dtype, device: torch.device) -> None:
    """Far above, far below, and between them, in one tile: each row as if it were alone."""
    levels = [0.0, 200.0, -200.0, 4.0, -60.0, 95.0, 1.0]
    args = scores_of(levels, 60, device, dtype)
    wanted = [False, True, True, False, True, True, False]
    assert marked(args, scale=1.0).flatten().tolist() == wanted
    assert_values(args, scale=1.0)
    got = UNIFIED_MAX_ATTENTION.call(*args, scale=1.0)
    again = DECODE_ATTENTION.call(*args, scale=1.0)
    redone = torch.tensor(wanted, device=device)
    assert torch.equal(got[:, :, redone], again[:, :, redone])


def test_float16_has_a_range_of_its_own(device: torch.device) -> None:
    """Weights that float16 would lose, and not float32: 20 below. Nothing is claimed of what is kept."""
    assert not marked(scores_of([-20.0], 60, device, torch.float32), scale=1.0).any()
    assert marked(scores_of([-20.0], 60, device, torch.float16), scale=1.0).all()
    assert_values(scores_of([-20.0, -7.0, 10.5], 60, device, torch.float16), scale=1.0)


def test_rows_without_keys_are_done_again(device: torch.device) -> None:
    """And only those: what they give is for the exact kernel to know."""
    args = heads(3, 40, 16, device)
    mask = torch.ones(3, 40, dtype=torch.bool, device=device)
    mask[1] = False
    assert marked(args, scale=0.3, mask=mask)[0, 0].tolist() == [False, True, False]
    for more in ({}, {"zero_masked_rows": True}, {"fill": LEAST}, {"fill": -1e4}):
        assert_values(args, scale=0.3, mask=mask, **more)


def test_sums_that_are_not_finite(device: torch.device) -> None:
    """Large values that overflow with their weights, NaN, and keys of infinite score."""
    q, k, v = scores_of([70.0, 0.0], 40, device, torch.float32)
    large = v * 1e25
    assert marked((q, k, large), scale=1.0).flatten().tolist() == [True, False]
    assert_values((q, k, large), scale=1.0)
    v[..., 7, 3] = math.nan
    assert marked((q, k, v), scale=1.0).all()
    assert_values((q, k, v), scale=1.0)
    bias = torch.zeros(40, device=device)
    bias[3] = math.inf
    assert UNIFIED_MAX_ATTENTION.call(q, k, v, scale=1.0, bias=bias).isnan().all()


def test_log_sum_exp_and_bits(device: torch.device) -> None:
    args = scores_of([0.0, 150.0, -3.0], 50, device, torch.float32)
    given = prepare(ops.attention.bind(args, {"scale": 1.0}))
    out, lse = torch.ops.effopt_triton.unified_max_attention(*given)
    expected = (double(args[0]) @ double(args[1]).mT).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=2e-5, atol=1e-5)
    assert torch.equal(torch.ops.effopt_triton.unified_max_attention(*given)[0], out)
    torch.library.opcheck(torch.ops.effopt_triton.unified_max_attention.default, given)


def test_any_fixed_maximum_gives_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    args = heads(2, 60, 16, device)
    monkeypatch.setattr(unified_max_attention, "PHI", 3.0)
    assert not marked(args, scale=0.3).any()
    assert_values(args, scale=0.3)
    assert_values(args, scale=0.3, sinks=torch.randn(2, device=device), softcap=2.0)


def test_it_is_chosen_by_measuring_only() -> None:
    """Its prediction is never the least; measured, it is a candidate like any other."""
    q, k = torch.empty(2, 8, 1, 64, device="meta"), torch.empty(2, 8, 16384, 64, device="meta")
    bound = ops.attention.bind((q, k, k), {"scale": 1.0})
    both = [UNIFIED_MAX_ATTENTION, DECODE_ATTENTION]
    choice = choose(both, H100, bound, q, False)
    assert choice.lowering is DECODE_ATTENTION
    assert "predicted" in dict(choice.refused)["triton-unified-max"]
    times = {"triton-unified-max": 1e-5, "triton-divided": 2e-5}
    assert choose(both, H100, bound, q, False, measure=lambda _: times).lowering is UNIFIED_MAX_ATTENTION
