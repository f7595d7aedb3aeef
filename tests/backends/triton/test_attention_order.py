"""In which order tiles begin: the longest of all heads first, as many heads in turn as the cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effopt.backends.triton import attention_tiles
from effopt.backends.triton.attention_refusals import checked, prepare
from effopt.graph import ops
from effopt.graph.ops import Sample
from tests.backends.triton.attention_calls import assert_attention_gradients
from tests.backends.triton.attention_cases import assert_values, heads


def turns(b: int, hkv: int, t: int, d: int, **more: Any) -> int:
    """Heads that take turns in a call on shapes alone."""
    q, k = (torch.empty(b, n, t, d, dtype=torch.bfloat16, device="meta") for n in (2 * hkv, hkv))
    operands = ops.attention.bind((q, k, k), {"scale": 1.0, **more})
    return checked(*prepare(operands)).lines_in_turn(t)


def test_how_many_heads_take_turns() -> None:
    """All where they fit the cache; those that fit; one by one where no tile is longer than another."""
    assert turns(2, 8, 1024, 128, is_causal=True) == 16
    assert turns(2, 8, 32768, 128, is_causal=True) == 2
    assert turns(2, 8, 2**20, 128, is_causal=True) == 1
    assert turns(2, 8, 1024, 128) == 1
    assert turns(2, 8, 4096, 128, low=-255, high=0) == 1


@pytest.mark.parametrize("held", [2, 100])
def test_every_tile_has_a_program(held: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three heads two and one take turns, or all; the last tile is not full."""
    made = heads(37, 37, 16, device, h=6, hkv=3)
    sample = Sample(made, {"scale": 0.3, "is_causal": True})
    monkeypatch.setattr(attention_tiles, "CACHED_BYTES", held * 37 * 32 * 4)
    assert_values("whole", sample)
    assert_attention_gradients(made, sample.kwargs)
