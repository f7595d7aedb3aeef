"""The block-sparse kernel against the op's reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effopt.backends.triton import block_sparse_attention as kernel_file
from effopt.backends.triton.block_sparse_attention import BLOCK_SPARSE_ATTENTION as KERNEL
from effopt.graph import ops
from effopt.graph.equivalence import difference
from effopt.graph.ops import Sample
from effopt.graph.ops.block_sparse_attention import MASKED_ROWS, blocks_in
from effopt.graph.tolerances import tolerance_of
from tests.backends.triton.calls import H100, double


def assert_values(sample: Sample) -> None:
    got = KERNEL.call(*sample.args, **sample.kwargs)
    own = KERNEL.op.reference(*sample.args, **sample.kwargs)
    wide = [double(x) if x.is_floating_point() else x for x in sample.args]
    exact = KERNEL.op.reference(*wide, **sample.kwargs)
    rtol = tolerance_of(sample.args[0].dtype).rtol
    assert difference(got, own, exact, rtol, 4 * rtol) == ""
    assert got.is_contiguous()


def call(t: int, s: int, d: int, block: int, device: Any, dv: int = 0, **more: Any) -> Sample:
    shapes = ((1, 4, t, d), (1, 2, s, d), (1, 2, s, dv or d))
    q, k, v = (torch.randn(shape, device=device) for shape in shapes)
    blocks = torch.rand(1, 4, blocks_in(t, block), blocks_in(s, block), device=device) > 0.5
    return Sample((q, k, v, blocks), {"block": block, "scale": 0.3, **more})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_samples(dtype: torch.dtype, device: torch.device) -> None:
    for sample in list(KERNEL.op.samples(dtype, device))[:: 1 if dtype == torch.float32 else 3]:
        assert KERNEL.supports(H100, KERNEL.op.bind(sample.args, sample.kwargs)) is None
        assert_values(sample)


@pytest.mark.parametrize(("t", "s"), [(1, 1), (63, 63), (100, 37), (37, 100), (1, 100)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sizes(t: int, s: int, is_causal: bool, device: torch.device) -> None:
    for block in (16, 64):
        for rows in MASKED_ROWS:
            assert_values(call(t, s, 16, block, device, is_causal=is_causal, masked_rows=rows))


@pytest.mark.parametrize(("d", "dv"), [(16, 0), (23, 40), (80, 0), (256, 0)])
def test_heads(d: int, dv: int, device: torch.device) -> None:
    mask = torch.arange(70, device=device)[None] > 20
    more = {"is_causal": True, "key_mask": mask, "softcap": 2.0, "masked_rows": "mean"}
    assert_values(call(70, 70, d, 32, device, dv, **more))


@pytest.mark.parametrize("is_causal", [False, True])
def test_lists_of_blocks(is_causal: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than a step, none selected, and views: one for all heads, and every other column."""
    monkeypatch.setattr(kernel_file, "LISTED", 16)
    drawn = torch.rand(2, 3, 9, 80, device=device) > 0.6
    drawn[1, 2, 4] = False
    for blocks in (drawn, drawn[:, :1].expand(2, 3, 9, 80), drawn[..., ::2]):
        index, count = kernel_file.listed(blocks, is_causal)
        kept = blocks.tril() if is_causal else blocks
        assert torch.equal(count, kept.sum(-1, dtype=torch.int32))
        for found, many, row in zip(index.flatten(0, 2), count.flatten(), kept.flatten(0, 2), strict=True):
            assert found[: int(many)].tolist() == row.nonzero().flatten().tolist()


def test_heads_that_take_turns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four heads at a time, as where the cache holds no more."""
    sample = call(70, 70, 16, 16, device, is_causal=True)
    whole = KERNEL.call(*sample.args, **sample.kwargs)
    monkeypatch.setattr(kernel_file, "CACHED_BYTES", 3 * 70 * 32 * 4)
    torch.testing.assert_close(
        KERNEL.call(*sample.args, **sample.kwargs), whole, rtol=0.0, atol=0.0, equal_nan=True
    )
    assert_values(sample)


def test_all_blocks_are_attention(device: torch.device) -> None:
    q, k, v, blocks = call(70, 70, 16, 32, device).args
    settings: dict[str, Any] = {"scale": 0.3, "is_causal": True}
    got = KERNEL.call(q, k, v, torch.ones_like(blocks), block=32, **settings)
    want = ops.attention.reference(q, k, v, **settings)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_refusals(device: torch.device) -> None:
    sample = call(40, 40, 16, 48, device)
    assert "blocks of 48 tokens" in (KERNEL.supports(H100, KERNEL.op.bind(sample.args, sample.kwargs)) or "")
    with pytest.raises(ValueError, match="blocks of 48 tokens"):
        KERNEL.call(*sample.args, **sample.kwargs)
    long = call(40, 40, 300, 16, device)
    assert "head sizes are 300" in (KERNEL.supports(H100, KERNEL.op.bind(long.args, long.kwargs)) or "")
