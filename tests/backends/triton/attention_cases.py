"""Calls of attention for its kernels, and how their values are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends.triton.attention_refusals import prepare
from effopt.backends.triton.attention_tiles import AttentionCall
from effopt.backends.triton.decode_attention import DECODE_ATTENTION
from effopt.backends.triton.flash_attention import FLASH_ATTENTION
from effopt.backends.triton.stream_k_attention import STREAM_K_ATTENTION
from effopt.graph import ops
from effopt.graph.equivalence import difference
from effopt.graph.ops import Sample
from effopt.graph.tolerances import tolerance_of
from tests.backends.triton.calls import double

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST = torch.finfo(torch.float32).min
KERNELS = {"whole": FLASH_ATTENTION, "divided": DECODE_ATTENTION, "streamed": STREAM_K_ATTENTION}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def takes(kernel: str, kwargs: Mapping[str, Any]) -> bool:
    """Shares of tiles are next to each other, so keys apart from the band are none of theirs."""
    return kernel != "streamed" or kwargs.get("anchors") is None


def heads(
    t: int, s: int, d: int, device: Any, *, b: int = 1, h: int = 2, hkv: int = 1, **given: Any
) -> tuple[Tensor, ...]:
    dtype, dv = given.get("dtype", torch.float32), given.get("dv", d)
    shapes = ((b, h, t, d), (b, hkv, s, d), (b, hkv, s, dv))
    return tuple(torch.randn(shape, device=device, dtype=dtype) for shape in shapes)


def assert_values(kernel: str, sample: Sample) -> None:
    """Within the table of float64 at the scale of the results, NaN where the reference has it."""
    got = KERNELS[kernel].call(*sample.args, **sample.kwargs)
    own = ops.attention.reference(*sample.args, **sample.kwargs)
    wide = {
        k: double(v) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in sample.kwargs.items()
    }
    exact = ops.attention.reference(*map(double, sample.args), **wide)
    rtol = tolerance_of(sample.args[0].dtype).rtol
    assert difference(got, own, exact, rtol, 4 * rtol) == ""
    assert got.shape == own.shape
    assert got.is_contiguous()


def kinds(t: int, s: int, device: Any, h: int = 2) -> dict[str, dict[str, Any]]:
    """Every kind of mask, by keyword; each of them leaves every row a key, but those named blind."""
    keep = torch.rand(1, 1, t, s, device=device) > 0.4
    keep[..., 0] = True
    blind = keep.clone()
    blind[..., t // 2, :] = False
    ids = [torch.arange(n, device=device) // 5 for n in (t, s)]
    unsorted = [torch.randint(0, 3, (1, n), device=device) for n in (t, s)]
    unsorted[1][0, 0], unsorted[0][:] = 1, 1
    padding = torch.arange(s, device=device) >= s // 3
    return {
        "none": {},
        "causal": {"is_causal": True},
        "causal, last rows aligned": {"high": s - t},
        "window": {"low": s - t - 6, "high": s - t, "rows_see_key": True, "fill": LEAST},
        "window, proved on the spot": {"low": -3, "high": s, "fill": -1e10},
        "chunk around": {"low": -4, "high": 4},
        "band beyond the keys": {"low": s - 2},
        "empty band": {"low": 3, "high": 1, "zero_masked_rows": True},
        "band, filled": {"low": -4, "high": -2, "fill": LEAST},
        "band and causal, filled": {"low": -20, "high": 3, "is_causal": True, "fill": -2.0},
        "mask": {"mask": keep},
        "mask by head": {"mask": torch.rand(h, t, s, device=device) > 0.4, "zero_masked_rows": True},
        "mask of padding": {"mask": padding.view(1, 1, 1, s)},
        "mask of padding, filled": {"mask": padding, "fill": LEAST},
        "mask of all keys": {"mask": torch.zeros(s, dtype=torch.bool, device=device)},
        "mask of all keys, filled": {"mask": torch.zeros(t, s, device=device).bool(), "fill": LEAST},
        "mask over queries": {"mask": torch.rand(t, 1, device=device) > 0.5, "zero_masked_rows": True},
        "blind": {"mask": blind},
        "blind, zero": {"mask": blind, "zero_masked_rows": True},
        "blind, filled": {"mask": blind, "fill": LEAST},
        "blind, causal, filled": {"mask": blind, "fill": LEAST, "is_causal": True},
        "filled near the scores": {"mask": blind, "fill": -0.5},
        "bias": {"bias": torch.randn(1, h, t, s, device=device)},
        "bias over keys": {"bias": torch.randn(s, device=device)},
        "bias of the least": {"bias": torch.where(blind, 0.0, LEAST)},
        "bias of minus infinity": {"bias": torch.where(blind, 0.0, -math.inf), "softcap": 3.0},
        "bias and mask": {"bias": torch.randn(h, 1, 1, device=device), "mask": keep, "fill": LEAST},
        "packed": {"query_ids": ids[0], "key_ids": ids[1], "zero_masked_rows": True},
        "packed, causal": {"query_ids": ids[0], "key_ids": ids[1], "high": 0},
        "packed, filled": {"query_ids": ids[0].int(), "key_ids": ids[1].int(), "fill": LEAST},
        "ids in any order": {"query_ids": unsorted[0], "key_ids": unsorted[1]},
        "soft-cap": {"softcap": 2.0, "is_causal": True},
        "sinks": {"sinks": torch.randn(h, device=device), "low": -5, "high": 0},
        "sinks, blind": {"sinks": torch.randn(h, device=device), "mask": blind},
        "sinks of the least": {"sinks": torch.tensor([LEAST, -math.inf], device=device), "mask": blind},
        "all at once": {
            "bias": torch.randn(t, s, device=device), "mask": keep, "softcap": 4.0, "low": -9,
            "high": s - t + 2, "sinks": torch.randn(h, device=device), "query_ids": unsorted[0],
            "key_ids": unsorted[1], "zero_masked_rows": True,
        },
    }  # fmt: skip


def call_of(t: int, s: int, **given: Any) -> AttentionCall:
    return AttentionCall(*prepare(ops.attention.bind(heads(t, s, 16, "cpu"), {"scale": 1.0, **given})))
