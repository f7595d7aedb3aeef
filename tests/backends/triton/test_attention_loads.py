"""How kernels of attention divide keys into parts, and what they never load."""

from __future__ import annotations

import math

import pytest
import torch

from effopt.backends.triton import decode_attention, stream_k_attention
from effopt.backends.triton.decode_attention import DECODE_ATTENTION
from effopt.backends.triton.flash_attention import FLASH_ATTENTION
from effopt.graph import ops
from tests.backends.triton.attention_cases import KERNELS, LEAST, call_of, heads
from tests.backends.triton.calls import double


@pytest.fixture(autouse=True)
def few_keys_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls, too, in parts: at most 4 of at least 5 keys, so that some parts are empty."""
    monkeypatch.setattr(decode_attention, "parts", lambda tiles, keys: max(1, min(4, keys // 5)))
    monkeypatch.setattr(stream_k_attention, "PROGRAMS", 5)


def test_divided_keys_are_merged_in_one_order(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of parts gives the same within rounding, and the same number the same bits."""
    q, k, v = heads(3, 200, 16, device, h=4)
    exact = ops.attention.reference(*map(double, (q, k, v)), scale=0.3)
    for number in (2, 3, 7):
        monkeypatch.setattr(decode_attention, "parts", lambda tiles, keys, n=number: n)
        first, second = (DECODE_ATTENTION.call(q, k, v, scale=0.3) for _ in range(2))
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), exact, rtol=2e-5, atol=1e-5)


def test_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    parts = decode_attention.parts
    assert parts(8, 100_000) == 32
    assert parts(1, 1024) == 4
    assert parts(8, 255) == parts(300, 100_000) == parts(1, 0) == 1


def test_what_is_never_loaded() -> None:
    """A fill of a finite number hides keys only where every row keeps a real one."""
    assert call_of(8, 8, low=-2).hides
    assert call_of(8, 8, low=-2, high=0, fill=LEAST).hides
    assert call_of(8, 8, is_causal=True, low=-2, high=4, fill=-1e9).band == (-2, 0)
    assert not call_of(8, 8, low=-2, high=-1, fill=LEAST).hides  # the first row sees no key
    assert not call_of(8, 4, low=-2, fill=LEAST).hides  # nor does the last
    assert not call_of(8, 8, low=-2, high=0, fill=-1e4).hides
    assert not call_of(8, 8, low=-2, fill=LEAST, mask=torch.ones(8, 8).bool()).hides
    assert call_of(8, 8, low=-2, fill=LEAST, mask=torch.ones(8, 8).bool(), rows_see_key=True).hides
    assert not call_of(8, 8, low=-2, fill=LEAST, bias=torch.zeros(8), rows_see_key=True).hides


def test_hidden_keys_are_not_read(device: torch.device) -> None:
    """NaN in values that causality, a band, ids or padding leave to no row of a tile changes nothing."""
    q, k, v = heads(4, 256, 16, device)
    spoiled = v.clone()
    spoiled[..., :64, :], spoiled[..., 192:, :] = math.nan, math.nan
    at = torch.arange(256, device=device)
    ids = (at // 64 == 1).long()
    for more in (
        {"low": 64, "high": 124},
        {"mask": (at >= 64) & (at < 192)},
        {"query_ids": ids[64:68], "key_ids": ids},
    ):
        for kernel in KERNELS.values():
            expected = kernel.call(q, k, v, scale=0.3, **more)
            assert torch.equal(kernel.call(q, k, spoiled, scale=0.3, **more), expected)
    assert FLASH_ATTENTION.call(q, k, spoiled, scale=0.3, is_causal=True).isnan().all()
    spoiled[..., :64, :] = v[..., :64, :]
    assert FLASH_ATTENTION.call(q, k, spoiled, scale=0.3, is_causal=True).isfinite().all()
