"""Shares of tiles: each tile once, equal counts, slots of their own; and requests of any length."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from effopt.backends.triton import stream_k_attention
from effopt.backends.triton.rows import launch
from effopt.backends.triton.stream_k_attention import STREAM_K_ATTENTION
from effopt.backends.triton.stream_k_schedule import (
    place_of_tile,
    programs_of_line,
    share_of_tiles,
    tiles_of_requests,
)
from effopt.graph import ops
from tests.backends.triton.calls import H100, assert_near, double


@triton.jit
def schedule_kernel(p_extents, p_places, p_lines, batch, lines, programs, tiles, REQUESTS: tl.constexpr):
    """All that the schedule says, written down: of every tile, then of every line."""
    o_b = tl.arange(0, REQUESTS)
    _, b_count = tiles_of_requests(p_extents, o_b, batch, 0, 0)
    share, _ = share_of_tiles(b_count, lines, programs)
    for tile in tl.range(0, tiles):
        i_b, i_line, i_tile = place_of_tile(tile, o_b, b_count, lines)
        tl.store(p_places + tile * 4, i_b)
        tl.store(p_places + tile * 4 + 1, i_line)
        tl.store(p_places + tile * 4 + 2, i_tile)
        tl.store(p_places + tile * 4 + 3, tile // share)
    for line in tl.range(0, batch * lines):
        first, parts = programs_of_line(line // lines, line % lines, o_b, b_count, lines, share)
        tl.store(p_lines + line * 2, first)
        tl.store(p_lines + line * 2 + 1, parts)


@pytest.mark.parametrize("counts", [[3], [0], [5, 0, 1], [0, 0, 7, 2], [1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("lines", [1, 3])
@pytest.mark.parametrize("programs", [1, 4, 7])
def test_the_schedule_by_enumeration(
    counts: list[int], lines: int, programs: int, device: torch.device
) -> None:
    row = [(b, n, i) for b, count in enumerate(counts) for n in range(lines) for i in range(count)]
    extents = torch.tensor([[0] * len(counts), counts], dtype=torch.int32, device=device)
    places = torch.zeros(max(1, len(row)), 4, dtype=torch.int32, device=device)
    told = torch.zeros(len(counts) * lines, 2, dtype=torch.int32, device=device)
    numbers = (len(counts), lines, programs, len(row))
    requests = triton.next_power_of_2(len(counts))
    launch(schedule_kernel, 1, extents, extents, places, told, *numbers, REQUESTS=requests)
    found = [tuple(place) for place in places.tolist()][: len(row)]
    assert [place[:3] for place in found] == row
    taken = [sum(place[3] == p for place in found) for p in range(programs)]
    assert sum(taken) == len(row)
    assert max(taken) == -(-len(row) // programs)
    assert taken == sorted(taken, reverse=True)
    segments = [
        key for key, _ in itertools.groupby(found, lambda place: (place[3], place[0] * lines + place[1]))
    ]
    slots = [program + line for program, line in segments]
    assert len(set(slots)) == len(slots)
    assert all(slot < programs + len(counts) * lines for slot in slots)
    for line, (first, parts) in enumerate(told.tolist()):
        mine = [program for program, of in segments if of == line]
        assert mine == list(range(first, first + parts))


@pytest.mark.parametrize("s", [1, 63, 100])
@pytest.mark.parametrize("programs", [1, 3, 16])
def test_requests_of_different_lengths(
    s: int, programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, one and all keys, grouped heads, a window; values that no request sees are not read."""
    monkeypatch.setattr(stream_k_attention, "PROGRAMS", programs)
    lengths = torch.tensor([0, 1, s, s // 2], device=device)
    q = torch.randn(4, 4, 1, 16, device=device)
    k, v = (torch.randn(4, 2, s, 16, device=device) for _ in range(2))
    mask = (torch.arange(s, device=device) < lengths[:, None])[:, None, None]
    for more in (
        {},
        {"softcap": 2.0, "sinks": torch.randn(4, device=device)},
        {"low": s - 40, "high": s - 1},
        {"zero_masked_rows": False},
    ):
        named = {"scale": 0.3, "zero_masked_rows": True, **more, "mask": mask}
        got = STREAM_K_ATTENTION.call(q, k, v, **named)
        exact = ops.attention.reference(*map(double, (q, k, v)), **named)
        assert_near(got, exact, torch.float32)
        again = STREAM_K_ATTENTION.call(q, k, v, **named)
        assert torch.equal(again.nan_to_num(7.0), got.nan_to_num(7.0))


def test_many_rows_or_requests_are_refused() -> None:
    q, k = torch.zeros(1, 4, 40, 8), torch.zeros(1, 1, 50, 8)
    bound = ops.attention.bind((q, k, k), {"scale": 1.0})
    assert "160 rows" in (STREAM_K_ATTENTION.supports(H100, bound) or "")
    q, k = torch.zeros(1025, 1, 1, 8), torch.zeros(1025, 1, 5, 8)
    bound = ops.attention.bind((q, k, k), {"scale": 1.0})
    assert "1025 requests" in (STREAM_K_ATTENTION.supports(H100, bound) or "")
    anchored = ops.attention.bind((q[:2], k[:2], k[:2]), {"scale": 1.0, "low": 1, "anchors": 1})
    assert "first keys" in (STREAM_K_ATTENTION.supports(H100, anchored) or "")
