"""Attention over selected blocks: the op against `attention`, the CPU kernel against the op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.backends import block_sparse
from effopt.backends.base import choose
from effopt.backends.block_sparse import LOWERINGS, Call, groups_of
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.graph.ops.block_sparse_attention import MASKED_ROWS, blocks_in, share_of_pairs
from effopt.target import target_of

(SELECTED,) = LOWERINGS
CPU = target_of(torch.device("cpu"))


def heads(t: int, s: int, *, b: int = 2, h: int = 4, hkv: int = 2, d: int = 8, dv: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t)
    shapes = ((b, h, t, d), (b, hkv, s, d), (b, hkv, s, dv))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def all_blocks(q: Tensor, k: Tensor, block: int) -> Tensor:
    return torch.ones(1, 1, *(blocks_in(x.shape[2], block) for x in (q, k)), dtype=torch.bool)


@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 40), (63, 63), (64, 64), (100, 37), (37, 100)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_all_blocks_are_attention(t: int, s: int, is_causal: bool) -> None:
    q, k, v = heads(t, s, dv=5)
    kwargs: dict[str, Any] = {"scale": 0.3, "is_causal": is_causal}
    want = ops.attention.reference(q, k, v, **kwargs)
    blocks = all_blocks(q, k, 16)
    assert torch.equal(ops.block_sparse_attention.reference(q, k, v, blocks, block=16, **kwargs), want)
    got = SELECTED.run(q, k, v, blocks, block=16, **kwargs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "settings_"), [
    ("nan", {}), ("zero", {"zero_masked_rows": True}), ("mean", {"fill": torch.finfo(torch.float32).min}),
])  # fmt: skip
def test_rows_without_keys_are_those_of_attention(rows: str, settings_: dict[str, Any]) -> None:
    """Left padding hides all keys of the first rows."""
    q, k, v = heads(40, 40)
    seen = torch.arange(40) >= torch.tensor([[21], [0]])
    want = ops.attention.reference(q, k, v, scale=0.3, mask=seen[:, None, None, :], high=0, **settings_)
    kwargs: dict[str, Any] = {"block": 16, "scale": 0.3, "is_causal": True, "key_mask": seen}
    for run in (ops.block_sparse_attention.reference, SELECTED.run):
        got = run(q, k, v, all_blocks(q, k, 16), masked_rows=rows, **kwargs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@settings(max_examples=60)
@given(
    t=st.integers(1, 50), s=st.integers(1, 50), block=st.sampled_from([8, 11, 16, 64]),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]), is_causal=st.booleans(), padded=st.booleans(),
    rows=st.sampled_from(MASKED_ROWS), softcap=st.sampled_from([0.0, 2.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_call_is_the_reference_in_float64(
    t: int, s: int, block: int, density: float, is_causal: bool, padded: bool, rows: str, softcap: float,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    q, k, v = heads(t, s)
    sizes = (2, 4, blocks_in(t, block), blocks_in(s, block))
    kwargs: dict[str, Any] = {
        "blocks": torch.rand(sizes, generator=generator) < density,
        "key_mask": torch.rand(2, s, generator=generator) > 0.4 if padded else None,
    }
    kwargs |= {"block": block, "scale": 0.3, "is_causal": is_causal, "masked_rows": rows, "softcap": softcap}
    want = ops.block_sparse_attention.reference(q.double(), k.double(), v.double(), **kwargs)
    got = SELECTED.run(q, k, v, **kwargs)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_few_rows_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "_GATHERED_BYTES", 1)
    q, k, v = heads(100, 100)
    kwargs: dict[str, Any] = {"block": 16, "scale": 0.3, "is_causal": True}
    want = ops.block_sparse_attention.reference(q, k, v, all_blocks(q, k, 16), **kwargs)
    torch.testing.assert_close(
        SELECTED.run(q, k, v, all_blocks(q, k, 16), **kwargs), want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_what_is_computed_is_what_is_selected(share: float) -> None:
    """Pairs in gathered blocks, those of a diagonal block counted whole."""
    q, k, v = heads(2048, 2048, b=1, h=2, hkv=1)
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.rand(1, 2, 32, 32, generator=generator) < share) | torch.eye(32, dtype=torch.bool)
    call = Call(q, k, v, blocks, 64, 0.3, True, 0.0, None, "nan")
    computed = sum(part.columns.numel() for part in groups_of(call)) * 64 * 64
    assert computed == int(blocks.tril().sum()) * 64 * 64
    density = share_of_pairs(blocks, 2048, 2048, 64, is_causal=True)
    dense = 2 * 2048 * 2049 / 2
    assert density * dense <= computed <= density * dense + 2 * 32 * 64 * 64 / 2


def test_costs_follow_density_and_the_kernel_is_chosen() -> None:
    q, k, v = (torch.empty(1, 8, 4096, 64, device="meta") for _ in range(3))
    blocks = torch.empty(1, 8, 64, 64, dtype=torch.bool, device="meta")
    costs = []
    for density in (0.1, 1.0):
        kwargs = {"block": 64, "scale": 1.0, "is_causal": True, "density": density}
        bound = ops.block_sparse_attention.bind((q, k, v, blocks), kwargs)
        lowerings = [SELECTED, reference_lowering(ops.block_sparse_attention)]
        assert choose(lowerings, CPU, bound, q, training=False).lowering is SELECTED
        costs.append(ops.block_sparse_attention.flops(bound, q))
    assert costs[0] == pytest.approx(0.1 * costs[1])
    assert "runs on a CPU" in (SELECTED.supports(target_of(torch.device("meta")), bound) or "")


def test_custom_op_is_well_formed() -> None:
    q, k, v = heads(40, 40)
    given_ = (q, k, v, all_blocks(q, k, 16), 16, 0.4, True, 0.0, None, "nan")
    torch.library.opcheck(torch.ops.effopt_cpu.block_sparse_attention.default, given_)
