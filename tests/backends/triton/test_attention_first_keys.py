"""Attention kernels with first keys that bands and ids do not mask: values, gradients, what is not read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from effopt.backends.triton import decode_attention, stream_k_attention
from effopt.backends.triton.attention_tiles import share_of_keys
from effopt.graph import ops
from effopt.graph.ops import Sample
from tests.backends.triton.attention_calls import assert_attention_gradients
from tests.backends.triton.attention_cases import (
    KERNELS,
    LEAST,
    assert_values,
    call_of,
    every_kernel,
    heads,
    takes,
)
from tests.backends.triton.calls import H100


def kinds_of_first_keys(t: int, s: int, device: Any) -> dict[str, dict[str, Any]]:
    """Anchors and prefixes, within a tile, of several, of all keys, and where they change nothing."""
    window = {"low": s - t - 4, "high": s - t}
    ids = {
        "query_ids": 1 + torch.arange(t, device=device) // 6,
        "key_ids": torch.arange(s, device=device) // 9,
    }
    padding = torch.arange(s, device=device) >= 2
    blind = {"zero_masked_rows": True}
    return {
        "anchors, window": {**window, "anchors": 3},
        "anchors of several tiles": {**window, "anchors": 39},
        "anchors that meet the band": {"low": 6, "high": 20, "anchors": 8},
        "anchors beyond the band": {"low": -2, "high": 5, "anchors": 40, **blind},
        "anchors, empty band": {"low": s, "anchors": 4},
        "anchors, nothing else, causal": {"low": s, "anchors": 4, "is_causal": True},
        "anchors of all keys": {**window, "anchors": s},
        "anchors of more than all keys": {"low": 0, "anchors": s + 9},
        "no anchors": {**window, "anchors": 0},
        "anchors of no band": {"anchors": 3, "is_causal": True},
        "anchors, packed": {**ids, "anchors": 2},
        "anchors, packed, causal": {**ids, "anchors": 2, "is_causal": True},
        "anchors, packed, window": {**ids, **window, "anchors": 5},
        "anchors, ids that no key has": {**ids, "query_ids": ids["query_ids"] + 99, "anchors": 2},
        "anchors, padded": {**window, "anchors": 5, "mask": padding, "rows_see_key": True, "fill": LEAST},
        "anchors, filled": {"low": 3, "high": 1, "anchors": 2, "fill": LEAST},
        "anchors, filled near the scores": {**window, "anchors": 3, "fill": -1.0},
        "anchors, sinks": {**window, "anchors": 3, "sinks": torch.randn(2, device=device)},
        "prefix": {"high": -2, "prefix": 9},
        "prefix of several tiles": {"high": s - t - 20, "prefix": 40},
        "prefix of all keys": {"high": 0, "prefix": s},
        "prefix before the band": {"low": 8, "high": 12, "prefix": 4},
        "prefix, causal": {"high": 0, "prefix": 9, "is_causal": True},
        "prefix, strict and causal": {"high": -3, "prefix": 5, "is_causal": True},
        "prefix of no band": {"prefix": 5},
        "prefix, filled": {"high": -4, "prefix": 3, "low": -30, "fill": LEAST},
        "prefix, packed": {**ids, "high": 0, "prefix": 12, **blind},
        "both": {**window, "anchors": 4, "prefix": 20},
        "both, biased": {
            "low": -3, "high": -1, "anchors": 4, "prefix": 7, "bias": torch.randn(t, s, device=device),
        },
    }  # fmt: skip


@pytest.fixture(autouse=True)
def few_keys_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "parts", lambda tiles, keys: max(1, min(3, keys // 5)))
    monkeypatch.setattr(stream_k_attention, "PROGRAMS", 5)


@every_kernel
@pytest.mark.parametrize("kind", kinds_of_first_keys(2, 2, "cpu"))
def test_values(kernel: str, kind: str, device: torch.device) -> None:
    t, s = 19, 120
    more = kinds_of_first_keys(t, s, device)[kind]
    sample = Sample(heads(t, s, 8, device), {"scale": 0.3, **more})
    if takes(kernel, more):
        assert_values(kernel, sample)
    else:
        with pytest.raises(ValueError, match="keys next to each other"):
            KERNELS[kernel].call(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("kind", kinds_of_first_keys(2, 2, "cpu"))
def test_gradients(kind: str, device: torch.device) -> None:
    t, s = 17, 70
    assert_attention_gradients(
        heads(t, s, 8, device), {"scale": 0.3, **kinds_of_first_keys(t, s, device)[kind]}
    )


def test_keys_between_are_not_read(device: torch.device) -> None:
    """NaN between the anchors and the band, and beyond prefix and band, changes nothing."""
    q, k, v = heads(4, 256, 16, device)
    spoiled = v.clone()
    spoiled[..., 32:192, :] = math.nan
    for more in ({"low": 192, "anchors": 7}, {"high": -9, "prefix": 30, "zero_masked_rows": True}):
        for call in (lowering.call for name, lowering in KERNELS.items() if takes(name, more)):
            expected = call(q, k, v, scale=0.3, **more)
            assert torch.equal(call(q, k, spoiled, scale=0.3, **more), expected)


def test_shares_of_tiles_refuse_anchors() -> None:
    bound = ops.attention.bind(heads(1, 100, 8, "cpu"), {"scale": 1.0, "low": 90, "anchors": 4})
    assert "keys next to each other" in (KERNELS["streamed"].supports(H100, bound) or "")
    assert KERNELS["divided"].supports(H100, bound) is None


def test_only_what_changes_something_is_compiled_in() -> None:
    assert call_of(8, 8, low=-2, anchors=3).anchored == 3
    assert call_of(8, 8, anchors=3).anchored == call_of(8, 8, high=0, anchors=3).anchored == 0
    assert call_of(8, 8, low=-2, anchors=99).anchored == 8
    assert call_of(8, 8, high=0, prefix=3).ahead == 3
    assert call_of(8, 8, high=0, prefix=3, is_causal=True).ahead == call_of(8, 8, prefix=3).ahead == 0
    strict = call_of(8, 8, high=-2, prefix=3, is_causal=True)
    assert (strict.ahead, strict.band, strict.options()["CAUSAL"]) == (3, (-8, -2), True)


def test_share_of_keys() -> None:
    def share(**given: Any) -> float:
        return share_of_keys(ops.attention.bind(heads(1, 100, 8, "cpu"), {"scale": 1.0, **given}))

    assert share(low=90) == pytest.approx(0.1)
    assert share(low=90, anchors=4) == pytest.approx(0.14)
    assert share(low=90, anchors=95) == 1.0
    assert share(high=0, prefix=30) == pytest.approx(0.3)
    assert share(high=0, prefix=30, is_causal=True) == pytest.approx(0.01)
