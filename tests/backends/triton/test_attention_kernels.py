"""The attention kernels against the op's reference in float64: kinds of masks, layouts, rows without keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from effopt.backends.triton import decode_attention, stream_k_attention
from effopt.backends.triton.attention_refusals import prepare
from effopt.backends.triton.attention_tiles import tile_for
from effopt.graph import ops
from effopt.graph.ops import Sample
from tests.backends.triton.attention_cases import (
    DTYPES,
    KERNELS,
    LEAST,
    assert_values,
    every_kernel,
    heads,
    kinds,
    takes,
)
from tests.backends.triton.calls import double


@pytest.fixture(autouse=True)
def few_keys_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls, too, in parts: at most 4 of at least 5 keys, so that some parts are empty."""
    monkeypatch.setattr(decode_attention, "parts", lambda tiles, keys: max(1, min(4, keys // 5)))
    monkeypatch.setattr(stream_k_attention, "PROGRAMS", 5)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_samples(kernel: str, dtype: torch.dtype, device: torch.device) -> None:
    samples = [s for s in ops.attention.samples(dtype, device) if takes(kernel, s.kwargs)]
    # Of the third size, 100 queries, the last alone for the kernel of a few: they take it a second each.
    count = 20 if kernel == "streamed" else 24
    for sample in (*samples[:count], samples[-2]) if dtype == torch.float32 else samples[:12]:
        assert_values(kernel, sample)


@every_kernel
@pytest.mark.parametrize("kind", kinds(2, 2, "cpu"))
def test_kinds_of_masks(kernel: str, kind: str, device: torch.device) -> None:
    """Where blocks of keys are whole, ragged, left out; where rows have one key, or none."""
    for t, s in ((33, 65), (7, 33)):
        sample = Sample(heads(t, s, 16, device), {"scale": 0.3, **kinds(t, s, device)[kind]})
        assert_values(kernel, sample)


@every_kernel
def test_bands_that_end_where_tiles_do(kernel: str, device: torch.device) -> None:
    made = heads(3, 80, 16, device)
    keys = tile_for(6, 16, torch.float32, dense=False).keys
    for apart in range(keys - 4, keys + 2):
        assert_values(kernel, Sample(made, {"scale": 0.3, "high": apart}))
        assert_values(kernel, Sample(made, {"scale": 0.3, "low": apart}))


@every_kernel
@pytest.mark.parametrize("d", [16, 80, *(pytest.param(d, marks=pytest.mark.slow) for d in (40, 64))])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 65), (7, 7), (33, 1), (65, 33)])
def test_odd_sizes(kernel: str, d: int, t: int, s: int, device: torch.device) -> None:
    assert_values(kernel, Sample(heads(t, s, d, device), {"scale": d**-0.5, "is_causal": True}))


@every_kernel
def test_head_sizes_and_groups(kernel: str, device: torch.device) -> None:
    for d, dv, h, hkv in ((192, 128, 2, 2), (8, 24, 6, 2), (256, 256, 1, 1), (1, 1, 5, 1)):
        sample = Sample(heads(5, 20, d, device, b=2, h=h, hkv=hkv, dv=dv), {"scale": d**-0.5, "high": 15})
        assert_values(kernel, sample)


@every_kernel
def test_two_and_three_dimensions(kernel: str, device: torch.device) -> None:
    q, k, v = (x[0] for x in heads(9, 12, 16, device, h=3, hkv=3))
    by_head = torch.randn(3, 9, 12, device=device)
    for more in (
        {},
        {"mask": by_head > 0, "zero_masked_rows": True},
        {"bias": by_head[:1]},
        {"sinks": by_head[:, 0, 0]},
    ):
        assert_values(kernel, Sample((q, k, v), {"scale": 0.3, **more}))
    assert_values(kernel, Sample((q[0], k[0], v[0]), {"scale": 0.3, "bias": by_head[0], "low": -5}))


@every_kernel
def test_layouts(kernel: str, device: torch.device) -> None:
    """Heads as a projection leaves them, keys of a cache, expanded, every other column, turned."""
    q, k, v = heads(6, 20, 16, device, b=2, h=4, hkv=2)
    cache = torch.full((2, 2, 64, 16), math.nan, device=device)
    cache[:, :, :20] = k
    for call in (
        (q.transpose(1, 2).contiguous().transpose(1, 2), cache[:, :, :20], v),
        (q, k[:1, :1].expand(2, 2, 20, 16), v[:, :, :1].expand(2, 2, 20, 16)),
        (q.repeat_interleave(2, -1)[..., ::2], k.mT.contiguous().mT, v[..., ::2]),
    ):
        bias = torch.randn(20, 6, device=device).t()
        assert_values(kernel, Sample(call, {"scale": 0.3, "bias": bias, "mask": (bias > -1)[:, ::1]}))


@every_kernel
def test_batches_with_masks_of_their_own(kernel: str, device: torch.device) -> None:
    q, k, v = heads(5, 23, 16, device, b=3, h=4, hkv=2)
    lengths = torch.tensor([1, 23, 9], device=device).view(3, 1, 1, 1)
    ids = torch.randint(0, 2, (3, 23), device=device)
    padding = torch.arange(23, device=device) < lengths
    for more in (
        {"mask": padding},
        {"mask": padding, "fill": LEAST, "rows_see_key": True},
        {"bias": torch.randn(3, 1, 5, 23, device=device)},
        {"query_ids": ids[:, :5], "key_ids": ids},
        {"query_ids": ids[:1, :5], "key_ids": ids, "fill": LEAST},
    ):
        assert_values(kernel, Sample((q, k, v), {"scale": 0.3, **more}))


@every_kernel
def test_empty(kernel: str, device: torch.device) -> None:
    for sizes in ({"b": 0}, {"t": 0}, {"h": 0, "hkv": 0}):
        made = heads(sizes.pop("t", 3), 4, 16, device, **sizes)
        got = KERNELS[kernel].call(*made, scale=1.0)
        assert got.shape == made[0].shape
    q, k, v = heads(3, 0, 16, device)
    assert KERNELS[kernel].call(q, k, v, scale=1.0).isnan().all()
    assert not KERNELS[kernel].call(q, k, v, scale=1.0, zero_masked_rows=True).any()


@every_kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under the interpreter, warns of inf - inf
def test_nan_and_infinity_stay_in_their_row(kernel: str, device: torch.device) -> None:
    q, k, v = heads(9, 40, 16, device)
    q[..., 2, 3], q[..., 4, 0] = math.nan, math.inf
    assert_values(kernel, Sample((q, k, v), {"scale": 0.3}))
    hidden = k.clone()
    hidden[..., 30:, :] = math.nan
    got = KERNELS[kernel].call(q[..., :2, :], hidden, v, scale=0.3, high=5)
    assert got.isfinite().all()


@every_kernel
def test_log_sum_exp(kernel: str, device: torch.device) -> None:
    """What merges attention over two sets of keys: natural, of the scores that a row sees."""
    q, k, v = heads(5, 40, 16, device)
    op = {
        "whole": torch.ops.effopt_triton.flash_attention,
        "divided": torch.ops.effopt_triton.decode_attention,
        "streamed": torch.ops.effopt_triton.stream_k_attention,
    }[kernel]
    for more in ({"high": 2}, {"bias": torch.randn(5, 40, device=device), "softcap": 2.0}, {"low": 38}):
        operands = ops.attention.bind((q, k, v), {"scale": 0.4, **more})
        given = prepare(operands)
        lse = op(*given, 0.0, None)[1] if kernel == "whole" else op(*given)[1]
        scores = (q.double() @ k.double().mT) * 0.4
        if "bias" in more:
            scores = 2.0 * torch.tanh(scores / 2.0) + more["bias"].double()
        apart = torch.arange(40, device=device) - torch.arange(5, device=device)[:, None]
        seen = (apart <= more.get("high", 40)) & (apart >= more.get("low", -5))
        expected = scores.masked_fill(~seen, -math.inf).logsumexp(-1)
        torch.testing.assert_close(lse.double(), expected, rtol=2e-5, atol=1e-5)


@st.composite
def some_calls(draw: st.DrawFn) -> tuple[Sample, bool]:
    """Small calls with any features at once."""
    t, s = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    hkv, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    d, dv = draw(st.sampled_from([(16, 16), (5, 16), (16, 3)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    named: dict[str, Any] = {"scale": 0.4, "zero_masked_rows": draw(st.booleans())}
    named["fill"] = draw(st.sampled_from([None, LEAST, -1e10, -3.0]))
    named["is_causal"] = draw(st.booleans())
    for name in ("low", "high"):
        named[name] = draw(st.none() | st.integers(-t - 2, s + 2))
    named["softcap"] = draw(st.sampled_from([0.0, 3.0]))
    leading = draw(st.sampled_from([(), (1,), (hkv * group, 1), (1, 1, 1), (t,), (1, 1, t)]))
    if draw(st.booleans()):
        named["mask"] = torch.rand(*leading, s) > 0.5
    if draw(st.booleans()):
        named["bias"] = torch.randn(*leading, draw(st.sampled_from([1, s])))
    if draw(st.booleans()):
        named["sinks"] = torch.randn(hkv * group)
    if draw(st.booleans()):
        named |= {"query_ids": torch.randint(0, 3, (t,)), "key_ids": torch.randint(0, 3, (s,))}
    return Sample(heads(t, s, d, "cpu", h=hkv * group, hkv=hkv, dv=dv), named), draw(st.booleans())


@given(some_calls())
@settings(max_examples=30)
def test_any_features_at_once(drawn: tuple[Sample, bool]) -> None:
    sample, divided = drawn
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in sample.kwargs.items()}
    assert_values("divided" if divided else "whole", Sample(tuple(x.to(device) for x in sample.args), placed))


@every_kernel
def test_opcheck(kernel: str, device: torch.device) -> None:
    """Schema, fake kernel, and AOTAutograd with dynamic shapes."""
    names = {"whole": "flash_attention", "divided": "decode_attention", "streamed": "stream_k_attention"}
    name = names[kernel]
    q, k, v = heads(3, 7, 16, device, h=4, hkv=2)
    operands = ops.attention.bind(
        (q, k, v), {"scale": 0.3, "low": -4, "mask": torch.ones(3, 7, device=device).bool()}
    )
    arguments = (*prepare(operands), *((0.0, None) if kernel == "whole" else ()))
    torch.library.opcheck(getattr(torch.ops.effopt_triton, name).default, arguments)


@every_kernel
def test_traced_with_symbolic_sizes(kernel: str, device: torch.device) -> None:
    """As a graph holds the call: any batch, numbers of queries and keys, and a band that follows them."""
    lowering, graphs = KERNELS[kernel], []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def last_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lowering.call(q, k, v, scale=0.3, high=k.shape[2] - q.shape[2], fill=LEAST)

    compiled = torch.compile(last_rows, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    for b, t, s in ((5, 3, 11), (6, 7, 40)):
        made = heads(t, s, 16, device, b=b, h=4, hkv=2)
        for x in made:
            torch._dynamo.mark_dynamic(x, [0, 2])
        exact = ops.attention.reference(*map(double, made), scale=0.3, high=s - t, fill=LEAST)
        torch.testing.assert_close(compiled(*made).double(), exact, rtol=2e-5, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.gpu
@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_on_gpu(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of real models, compiled, and parts as they are chosen."""
    monkeypatch.undo()
    for t, s, d in ((1, 8192, 128), (1000, 1000, 64), (333, 2000, 256)):
        for kind, more in kinds(t, s, "cuda", h=8).items():
            if "sinks of" not in kind:
                made = heads(t, s, d, "cuda", h=8, hkv=2, dtype=dtype)
                assert_values(kernel, Sample(made, {"scale": d**-0.5, **more}))
