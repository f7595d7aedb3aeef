"""Rows of an attention whose keys the kernel knows by their bounds: each once, and equal to the op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.backends.band_steps import STEP, band, band_backward
from effopt.backends.block_attention import block_attention
from effopt.backends.key_blocks import Call
from effopt.backends.known_rows import Kind, Rows, rows_of
from effopt.graph import ops
from effopt.graph.ops.attention import open_keys

ALL, CAUSAL, BAND = Kind.ALL, Kind.CAUSAL, Kind.BAND


def operands(
    t: int, s: int, b: int = 1, heads: int = 2, hkv: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as models have them: heads behind tokens."""
    generator = torch.Generator().manual_seed(t * s)
    shapes = ((b, t, heads, 8), (b, s, hkv, 8), (b, s, hkv, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes)
    return q, k, v


def rows(t: int, s: int, b: int = 1, **told: Any) -> list[Rows]:
    given: dict[str, Any] = {"bias": None, "mask": None, "sinks": None, "query_ids": None, "key_ids": None}
    given |= {
        "scale": 1.0,
        "fill": -math.inf,
        "softcap": 0.0,
        "low": -t,
        "high": s,
        "anchors": 0,
        "prefix": 0,
    }
    call = Call(*operands(t, s, b), **(given | told), zero_masked_rows=False, rows_see_key=False)
    return list(rows_of(call))


def forms(found: list[Rows]) -> list[tuple[int, int, list[tuple[Kind, int, int]]]]:
    """First row, row behind the last, and what they see."""
    return [
        (x.queries.start, x.queries.stop, [(kind, k.start, k.stop) for kind, k in x.ranges]) for x in found
    ]


def ids(*lengths: int) -> dict[str, Tensor]:
    """Documents of a row."""
    made = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return {"query_ids": made, "key_ids": made.clone()}


def test_causal() -> None:
    assert forms(rows(100, 100, high=0)) == [(0, 100, [(CAUSAL, 0, 100)])]


def test_causal_behind_a_past() -> None:
    assert forms(rows(100, 140, high=40)) == [(0, 100, [(ALL, 0, 40), (CAUSAL, 40, 140)])]


def test_keys_end_before_the_last_row() -> None:
    assert forms(rows(100, 60, high=0)) == [(0, 60, [(CAUSAL, 0, 60)]), (60, 100, [(ALL, 0, 60)])]


def test_rows_without_a_key_are_left() -> None:
    assert forms(rows(100, 100, high=-20)) == [(0, 20, []), (20, 100, [(CAUSAL, 0, 80)])]


def test_window() -> None:
    begin = (0, 20, [(CAUSAL, 0, 20)])
    assert forms(rows(148, 148, low=-19, high=0)) == [begin, (20, 148, [(BAND, 1, 148)])]
    assert forms(rows(150, 150, low=-19, high=0))[1:] == [(20, 148, [(BAND, 1, 148)]), (148, 150, [])]


def test_window_with_anchors() -> None:
    found = forms(rows(151, 151, low=-19, high=0, anchors=3))
    assert found == [(0, 23, [(CAUSAL, 0, 23)]), (23, 151, [(ALL, 0, 3), (BAND, 4, 151)])]


def test_window_on_both_sides() -> None:
    found = forms(rows(96, 96, low=-16, high=16))
    assert found[0] == (0, 17, [(ALL, 0, 16), (CAUSAL, 16, 33)])
    assert found[1] == (17, 49, [(BAND, 1, 65)])
    assert [x[:2] for x in found if not x[2]] == [(49, 80), (80, 96)]


def test_prefix() -> None:
    found = forms(rows(100, 100, high=0, prefix=30))
    assert found == [(0, 30, [(ALL, 0, 30)]), (30, 100, [(ALL, 0, 30), (CAUSAL, 30, 100)])]


def test_documents() -> None:
    found = forms(rows(100, 100, high=0, **ids(40, 3, 5, 52)))
    assert found == [(0, 40, [(CAUSAL, 0, 40)]), (40, 48, []), (48, 100, [(CAUSAL, 48, 100)])]
    both = forms(rows(100, 100, **ids(40, 60)))
    assert both == [(0, 40, [(ALL, 0, 40)]), (40, 100, [(ALL, 40, 100)])]


def test_windows_in_documents() -> None:
    found = forms(rows(120, 120, low=-19, high=0, **ids(20, 100)))
    assert found[:2] == [(0, 20, [(CAUSAL, 0, 20)]), (20, 40, [(CAUSAL, 20, 40)])]
    assert found[2] == (40, 104, [(BAND, 21, 104)])


def test_padding() -> None:
    seen = torch.arange(100) >= torch.tensor([[0], [30]])
    left = rows(100, 100, b=2, high=0, mask=seen[:, None, None])
    assert [x.batch for x in left] == [slice(0, 1), slice(1, 2), slice(1, 2)]
    assert forms(left)[1:] == [(0, 30, []), (30, 100, [(CAUSAL, 30, 100)])]
    right = forms(rows(100, 100, b=2, high=0, mask=seen.flip(1)[:, None, None]))
    assert right[1:] == [(0, 70, [(CAUSAL, 0, 70)]), (70, 100, [(ALL, 0, 70)])]


holes = torch.arange(100) % 7 != 3
LEFT: dict[str, dict[str, Any]] = {
    "documents that come again": {"high": 0, **ids(40, 60), "key_ids": torch.arange(100)[None] % 2},
    "one document in two places": {
        "query_ids": torch.arange(100)[None] // 25 % 3,
        "key_ids": torch.arange(100)[None] // 25 % 3,
    },
    "documents and anchors": {"high": 0, "anchors": 2, **ids(40, 60)},
    "documents and padding": {"high": 0, "mask": ~holes[None, None, None], **ids(40, 60)},
    "keys left out between": {"high": 0, "mask": holes},
    "no key at all": {"high": 0, "mask": torch.zeros(100, dtype=torch.bool)},
    "another range in each head": {"high": 0, "mask": torch.stack([holes | True, ~holes])[None, :, None]},
    "a mask of rows": {"high": 0, "mask": torch.ones(100, 1, dtype=torch.bool)},
    "bias": {"high": 0, "bias": torch.zeros(100)},
    "soft-cap": {"high": 0, "softcap": 3.0},
    "sinks": {"high": 0, "sinks": torch.zeros(2)},
    "lower bound alone": {"low": 3},
    "few rows": {"high": 0, "t": 8},
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left_to_blocks(name: str) -> None:
    told = {"t": 100, **LEFT[name]}
    found = rows(told.pop("t"), 100, **told)
    assert not any(x.ranges for x in found), forms(found)


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, int, int, dict[str, Any]]:
    """Rows, keys, entries, and what is told of them."""
    t, s, b = draw(st.integers(1, 150)), draw(st.integers(1, 150)), draw(st.integers(1, 2))
    told: dict[str, Any] = {}
    kind = draw(st.sampled_from(["band", "documents", "padding"]))
    if kind == "documents":
        s = t
        ends = sorted(draw(st.lists(st.integers(1, t), max_size=4)))
        made = torch.bucketize(torch.arange(t), torch.tensor([*ends, t]), right=True)
        told = {"query_ids": made[None], "key_ids": made[None]}
    elif kind == "padding":
        first, last = sorted(draw(st.tuples(st.integers(0, s), st.integers(0, s))))
        seen = torch.ones(b, s, dtype=torch.bool)
        seen[-1] = (torch.arange(s) >= first) & (torch.arange(s) < last)
        told = {"mask": seen[:, None, None]}
    if draw(st.booleans()):
        told["low"] = draw(st.integers(-t - 3, s))
        told["anchors"] = draw(st.integers(0, 9))
    if draw(st.booleans()) or kind == "padding":
        told["high"] = draw(st.integers(-t, s + 3))
        told["prefix"] = draw(st.integers(0, s))
    return t, s, b, told


@settings(max_examples=150, deadline=None)
@given(calls(), st.booleans())
def test_any_rows(call: tuple[int, int, int, dict[str, Any]], is_grouped: bool) -> None:
    """Results and gradients of float64, against softmax over the mask written out."""
    t, s, b, told = call
    given = operands(t, s, b, 4 if is_grouped else 2, 2, torch.float64)
    covered = torch.zeros(b, t, dtype=torch.int64)
    for x in rows(t, s, b, **told):
        covered[x.batch, x.queries] += 1
    assert bool((covered == 1).all())
    settings_ = {"scale": 0.3, "zero_masked_rows": True}
    mine, theirs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    got = block_attention(*mine, **settings_, **told)
    wanted = ops.attention.reference(*theirs, **settings_, **told)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(t), dtype=got.dtype)
    pairs = zip(torch.autograd.grad(got, mine, grad), torch.autograd.grad(wanted, theirs, grad), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [1, 5, 33, 64, 200])
@pytest.mark.parametrize("hkv", [4, 2, 1])
def test_band_in_steps(width: int, hkv: int) -> None:
    n = 5 * STEP
    q, k, v = operands(n, n + width - 1, 2, 4, hkv, torch.float64)
    seen = open_keys(n, n + width - 1, q.device, 0, width - 1)
    of = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted, lse = ops.attention_lse.reference(*of, scale=0.3, mask=seen)
    out, mine = band(q, k, v, 0.3)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(mine, lse)
    grad = torch.randn_like(out)
    found = band_backward(grad, q, k, v, out, mine, 0.3)
    for one, other in zip(found, torch.autograd.grad(wanted, of, grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("told", [{"low": -19, "high": 0, "anchors": 4}, {"high": 0, "prefix": 40}])
def test_parts_of_16_bits_are_joined_in_float32(dtype: torch.dtype, told: dict[str, int]) -> None:
    q, k, v = operands(150, 150, 2, 4, 2, dtype)
    wanted = ops.attention.reference(*(x.double() for x in (q, k, v)), scale=0.3, **told)
    got = block_attention(q, k, v, scale=0.3, **told)
    assert got.dtype == dtype
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 2 * torch.finfo(dtype).eps
