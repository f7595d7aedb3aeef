"""Attention by blocks of keys: equal to the op, for every way to say which keys a query sees."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.backends import band_steps, key_blocks, known_rows
from effopt.backends.base import choose
from effopt.backends.block_attention import LOWERINGS, block_attention
from effopt.backends.key_blocks import Call, blocks_of, entries_of
from effopt.backends.native import LOWERINGS as NATIVE
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.target import target_of

(BLOCKS,) = LOWERINGS
CPU = target_of(torch.device("cpu"))
B, H, HKV, T, S, D = 2, 4, 2, 23, 29, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_blocks, "_LEAST", 4)
    monkeypatch.setattr(key_blocks, "_MOST", 8)
    monkeypatch.setattr(known_rows, "STEP", 4)
    monkeypatch.setattr(band_steps, "STEP", 4)
    monkeypatch.setattr(known_rows, "_FEW", 2)


def operands(dtype: torch.dtype = torch.float32, t: int = T, s: int = S) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, t, D), (B, HKV, s, D), (B, HKV, s, D))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def cases() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    lowest = torch.finfo(torch.float32).min
    packed = torch.arange(S).expand(B, S) // torch.tensor([[5], [11]])
    shuffled = torch.randint(0, 5, (B, S), generator=generator)
    pad = torch.arange(S) >= torch.tensor([[3], [9]])
    dense = torch.rand(B, 1, T, S, generator=generator) > 0.3
    bias = torch.randn(H, T, S, generator=generator)
    return {
        "window": {"low": -4, "high": 0},
        "window, ahead of the first keys": {"low": 2, "high": 9},
        "upper bound": {"high": S - T},
        "lower bound": {"low": -2},
        "empty band": {"low": 3, "high": 2},
        "beyond all keys": {"low": S},
        "beyond all keys, lowest": {"low": S - 9, "fill": lowest},
        "first rows see nothing": {"high": -6, "zero_masked_rows": True},
        "first rows see nothing, lowest, no zeros": {"high": -6, "fill": lowest, "zero_masked_rows": True},
        "first rows see nothing, -inf": {"high": -6, "fill": -math.inf},
        "first rows see nothing, lowest": {"high": -6, "fill": lowest},
        "window, anchors": {"low": -4, "high": 0, "anchors": 3},
        "window, anchors within the first block": {"low": -4, "high": 0, "anchors": 7, "is_causal": True},
        "window ahead, anchors": {"low": 2, "high": 9, "anchors": 2},
        "empty band, anchors": {"low": 3, "high": 2, "anchors": 5},
        "anchors beyond all keys": {"low": -2, "high": 0, "anchors": S + 4},
        "anchors of a lower bound alone": {"low": S - 4, "anchors": 1},
        "prefix": {"high": 0, "prefix": 11},
        "prefix beyond all keys": {"high": -3, "prefix": S + 1},
        "prefix, window": {"low": -5, "high": 0, "prefix": 9},
        "prefix and anchors": {"low": -5, "high": 0, "prefix": 9, "anchors": 4},
        "prefix, first rows see nothing": {"low": 6, "high": -8, "prefix": 3, "fill": lowest},
        "ids, anchors": {"query_ids": packed[:, :T], "key_ids": packed, "anchors": 2, "is_causal": True},
        "ids of no order, anchors": {"query_ids": shuffled[:, :T], "key_ids": shuffled.flip(1), "anchors": 3},
        "padding, anchors": {
            "low": -4,
            "high": 2,
            "mask": pad[:, None, None, :],
            "fill": lowest,
            "anchors": 4,
        },
        "mask, anchors": {"low": -5, "high": 0, "mask": dense, "anchors": 4},
        "bias, anchors": {"low": -5, "high": 0, "bias": bias, "anchors": 4},
        "bias of keys, anchors": {"low": -5, "high": 0, "bias": bias[:1, :1], "anchors": 4},
        "soft-cap, anchors": {"softcap": 2.0, "low": -5, "high": 0, "anchors": 4},
        "sinks, anchors": {"sinks": bias[:, 0, 0], "low": -5, "high": 0, "anchors": 4},
        "ids": {"query_ids": packed[:, :T], "key_ids": packed},
        "ids of no order": {"query_ids": shuffled[:, :T], "key_ids": shuffled.flip(1)},
        "ids for all entries": {"query_ids": packed[0, :T], "key_ids": packed[0], "high": 0},
        "ids for all entries by one row": {"query_ids": packed[:1, :T], "key_ids": packed, "high": 0},
        "ids that no key has": {"query_ids": packed[:, :T] + 4, "key_ids": packed, "fill": lowest},
        "padding": {"high": 2, "mask": pad[:, None, None, :], "fill": lowest},
        "padding on the right": {"high": 2, "mask": pad.flip(1)[:, None, None, :], "fill": lowest},
        "padding for all entries": {"high": 2, "mask": pad[0], "zero_masked_rows": True},
        "no padding": {"high": 2, "mask": torch.ones((), dtype=torch.bool)},
        "mask": {"low": -9, "mask": dense},
        "mask of rows": {"low": -9, "mask": dense[:, :, :, :1], "fill": -1e30},
        "mask of each head": {"low": -9, "mask": dense.expand(B, H, T, S)},
        "bias": {"low": -9, "bias": bias},
        "bias of keys": {"low": -9, "high": 4, "bias": bias[:, :1], "rows_see_key": True},
        "bias of each entry": {"low": -9, "bias": torch.where(dense, 0.5, -math.inf)},
        "bias and mask": {"low": -9, "bias": bias, "mask": dense},
        "soft-cap": {"softcap": 2.0, "is_causal": True},
        "soft-cap, window": {"softcap": 2.0, "low": -4, "high": 0, "fill": lowest, "rows_see_key": True},
        "soft-cap, blind rows": {"softcap": 2.0, "high": -3, "fill": lowest},
        "sinks": {"sinks": torch.randn(H, generator=generator), "low": -3, "high": 0},
        "sinks, blind rows": {"sinks": torch.randn(H, generator=generator), "high": -3},
        "sinks, bias and mask": {
            "sinks": torch.randn(H, generator=generator),
            "high": 3,
            "mask": dense,
            "bias": bias,
        },
    }


@pytest.mark.parametrize("name", cases())
def test_equals_reference(name: str) -> None:
    kwargs = {"scale": 0.4, **cases()[name]}
    q, k, v = operands()
    assert BLOCKS.supports(CPU, ops.attention.bind((q, k, v), kwargs)) is None
    got, wanted = BLOCKS.run(q, k, v, **kwargs), ops.attention.reference(q, k, v, **kwargs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", cases())
def test_gradients(name: str) -> None:
    kwargs = {"scale": 0.4, **cases()[name]}
    blind_is_nan = ops.attention.reference(*operands(), **kwargs).isnan().any()
    kwargs |= {"zero_masked_rows": True} if blind_is_nan else {}
    learned = [n for n in ("bias", "sinks") if n in kwargs]

    def gradients(call: Any) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in operands(torch.float64)]
        more = {n: kwargs[n].double().requires_grad_() for n in learned}
        out = call(*leaves, **{**kwargs, **more})
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
        return torch.autograd.grad((out * direction).sum(), [*leaves, *more.values()])

    for got, wanted in zip(gradients(block_attention), gradients(ops.attention.reference), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.none() | st.integers(-22, 22),
    st.none() | st.integers(-22, 22),
    st.none() | st.integers(0, 22),
    st.none() | st.integers(0, 22),
    st.integers(0, 4),
    st.sampled_from([None, torch.finfo(torch.float32).min]),
    st.integers(0, 999),
)
def test_any_sizes(
    t: int, s: int, low: Any, high: Any, anchors: Any, prefix: Any, ids: int, fill: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kwargs = {"scale": 0.4, "low": low, "high": high, "fill": fill, "anchors": anchors, "prefix": prefix}
    if ids:
        kwargs["query_ids"] = torch.randint(0, ids, (B, t), generator=generator)
        kwargs["key_ids"] = torch.randint(0, ids, (B, s), generator=generator)
    if seed % 3 == 0:
        kwargs["mask"] = torch.rand(B, 1, 1, s, generator=generator) > 0.5
    q, k, v = operands(t=t, s=s)
    got, wanted = block_attention(q, k, v, **kwargs), ops.attention.reference(q, k, v, **kwargs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def computed(t: int, s: int, **kwargs: Any) -> float:
    """Share of all (query, key) pairs that blocks hold."""
    q, k, v = operands(t=t, s=s)
    given = {"bias": None, "mask": None, "sinks": None, "query_ids": None, "key_ids": None, **kwargs}
    given = {
        "low": -t,
        "high": s,
        "anchors": 0,
        "prefix": 0,
        "scale": 1.0,
        "fill": -math.inf,
        "softcap": 0.0,
        **given,
    }
    call = Call(q, k, v, **given, zero_masked_rows=False, rows_see_key=False)
    found = [block for entry in entries_of(call) for block in blocks_of(call, entry, slice(0, t))]
    length = lambda x: x.stop - x.start  # noqa: E731
    pairs = [length(x.batch) * length(x.queries) * length(keys) for x in found for _, keys in x.segments]
    return sum(pairs) / (B * t * s)


def test_blocks_hold_what_is_open_and_little_more() -> None:
    edge = 8 / 256
    ids = (torch.arange(256) // 64).expand(B, 256)
    pad = (torch.arange(256) < 64)[None, None, None, :]
    assert 0.5 <= computed(256, 256, high=0) <= 0.5 + edge
    assert 32 / 256 <= computed(256, 256, low=-31, high=0) <= 32 / 256 + edge
    assert computed(256, 256, query_ids=ids, key_ids=ids) == 0.25
    assert computed(256, 256, query_ids=ids, key_ids=ids, high=0) <= 0.125 + edge
    assert computed(256, 256, mask=pad) == 0.25
    anchored = 36 / 256 + edge
    assert 32 / 256 <= computed(256, 256, low=-31, high=0, anchors=4) <= anchored
    assert 0.25 + 0.28 <= computed(256, 256, high=0, prefix=64) <= 0.25 + 0.29 + edge


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing known": ({}, "no band and no ids"),
    "only a mask": ({"mask": torch.ones(T, S, dtype=torch.bool)}, "no band and no ids"),
    "causal, which the library skips": ({"is_causal": True}, "no band and no ids"),
    "dropout": ({"high": 0, "dropout_p": 0.1}, "no dropout"),
    "causal behind a band with a prefix": ({"high": -2, "prefix": 3, "is_causal": True}, "one of the two"),
    "small fill": ({"high": 0, "fill": -1e4}, "fill with -inf"),
    "bias and a finite fill": ({"high": 0, "fill": -1e38, "bias": torch.zeros(T, S)}, "fill with -inf"),
    "causal and a finite fill": ({"low": -3, "fill": -1e38, "is_causal": True}, "fill with -inf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name: str) -> None:
    kwargs, reason = REFUSED[name]
    said = BLOCKS.supports(CPU, ops.attention.bind(tuple(operands()), {"scale": 1.0, **kwargs}))
    assert said is not None
    assert reason in said


def test_other_devices_and_ranks() -> None:
    q = torch.randn(3, 5, 8)
    bound = ops.attention.bind((q, q, q), {"scale": 1.0, "high": 0})
    assert "4 dimensions" in (BLOCKS.supports(CPU, bound) or "")
    assert "runs on a CPU" in (BLOCKS.supports(target_of(torch.device("meta")), bound) or "")


@pytest.mark.parametrize(
    ("t", "kwargs", "name"),
    [
        (4096, {"low": -255, "high": 0}, "blocks"),
        (4096, {"query_ids": torch.zeros(1, 4096), "key_ids": torch.zeros(1, 4096), "high": 0}, "blocks"),
        (4096, {"is_causal": True}, "sdpa"),
        (4096, {"is_causal": True, "softcap": 5.0}, "blocks"),
        (16, {"low": -3, "high": 0}, "sdpa"),
        (4096, {"low": -255, "high": 0, "anchors": 4}, "blocks"),
        (256, {"high": 0, "bias": torch.empty(1, 8, 1, 256, device="meta")}, "sdpa-with-bias"),
        (2048, {"high": 0, "bias": torch.empty(1, 8, 1, 2048, device="meta")}, "blocks"),
        (4096, {"high": 0, "prefix": 4000}, "sdpa"),
        (1, {"high": 4095}, "sdpa"),
        (1, {"mask": torch.zeros(1, 1, 1, 8192, dtype=torch.bool, device="meta")}, "blocks"),
        (1, {"mask": torch.zeros(1, 1, 1, 16, dtype=torch.bool, device="meta")}, "sdpa"),
    ],
)
def test_choice_by_cost(t: int, kwargs: dict[str, Any], name: str) -> None:
    q = torch.empty(1, 8, t, 64, device="meta")
    keys = max(t, 16) if kwargs.get("mask") is None else kwargs["mask"].shape[-1]
    k = torch.empty(1, 8, keys, 64, device="meta")
    bound = ops.attention.bind((q, k, k), {"scale": 1.0, **kwargs})
    lowerings = [BLOCKS, *NATIVE, reference_lowering(ops.attention)]
    assert choose(lowerings, CPU, bound, q, training=False).lowering.name == name


def test_custom_op_is_well_formed() -> None:
    q, k, v = (x.requires_grad_() for x in operands())
    given = (q, k, v, None, None, None, None, None, 0.4, -math.inf, 0.0, -4, 0, 2, 0, False, False)
    torch.library.opcheck(torch.ops.effopt_cpu.block_attention.default, given)


def test_compiled_with_symbolic_sizes() -> None:
    call = torch.compile(lambda q, k, v: block_attention(q, k, v, scale=0.4, low=-4, high=0), dynamic=True)
    for t in (9, 23):
        q, k, v = operands(t=t, s=t)
        wanted = ops.attention.reference(q, k, v, scale=0.4, low=-4, high=0)
        torch.testing.assert_close(call(q, k, v), wanted, rtol=1e-5, atol=1e-5)
