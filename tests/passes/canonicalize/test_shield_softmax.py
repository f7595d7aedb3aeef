"""What Inductor takes for attention, end to end: results stay those of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from effopt.compile import effopt, record
from effopt.passes.canonicalize.shield_softmax import ShieldSoftmax


def with_inductor(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> tuple[Any, int, Any]:
    """(result, how often Inductor's attention patterns fired, report). Caches off: they hide the counter."""
    torch._dynamo.reset()
    counters.clear()
    settings = {"inductor": {"force_disable_caches": True}, **options}
    with record() as report:
        compiled = torch.compile(
            function, backend=lambda m, i: effopt(m, i, options=settings), fullgraph=True
        )
        out = compiled(*inputs)
    return out, counters["inductor"]["fuse_attention"], report


def operands(*shape: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for _ in range(3)]


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 5.0).softmax(dim=-2) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 5.0).softmax(dim=1) @ v


def test_softmax_over_queries_and_heads() -> None:
    """An error (pytorch/pytorch#196468) of 1.4 under plain Inductor 2.13. With gradients."""

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return over_queries(q, k, v), over_heads(q, k, v)

    inputs = [x.requires_grad_() for x in operands(4, 16, 32, 32)]
    out, fired, report = with_inductor(both, *inputs)
    wanted = both(*inputs)
    assert fired == 0
    assert report.ops["attention"] == 0
    assert report.counts[ShieldSoftmax.name] == 2
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(wanted[0])
    got = torch.autograd.grad(sum((o * direction).sum() for o in out), inputs)
    expected = torch.autograd.grad(sum((w * direction).sum() for w in wanted), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_permuted_key_stays_right() -> None:
    """An error (pytorch/pytorch#195320) of 0.5 under plain Inductor 2.13."""

    def permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.permute(0, 2, 3, 1) / 5.0).softmax(dim=-1) @ v

    inputs = operands(2, 16, 16, 16)
    out, fired, _ = with_inductor(permuted, *inputs)
    assert fired == 0
    torch.testing.assert_close(out, permuted(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lowering", ["auto", "reference"])
def test_row_that_sees_no_key_stays_nan(lowering: str) -> None:
    """Softmax gives NaN where scaled_dot_product_attention gives 0."""

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / 5.0 + mask).softmax(dim=-1) @ v

    inputs = operands(4, 2, 16, 32)
    mask = torch.zeros(4, 2, 16, 16)
    mask[1, 0, 3] = float("-inf")
    out, fired, report = with_inductor(masked, *inputs, mask, lowering=lowering)
    assert fired == 0
    assert report.ops["attention"] == 1
    assert {r.kernel for r in report.lowerings} == {"sdpa-with-bias" if lowering == "auto" else "reference"}
    assert out[1, 0, 3].isnan().all()
    torch.testing.assert_close(out, masked(*inputs, mask), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_respelled_softmax_is_equal(dtype: torch.dtype, compiled: Any) -> None:
    q = torch.randn(2, 4, 6, 6, dtype=dtype)
    q[0, 0, 0] = 1e4
    out, report = compiled(over_queries, q, q, q)
    assert report.counts[ShieldSoftmax.name] == 1
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out, over_queries(q, q, q), rtol=tolerance, atol=tolerance)


def test_other_softmaxes_are_left(compiled: Any) -> None:
    x, w = torch.randn(3, 5), torch.randn(5, 5)
    for function in (lambda x, w: (x @ w).softmax(-1), lambda x, w: x.softmax(-1) @ w):
        _, report = compiled(function, x, w)
        assert report.counts[ShieldSoftmax.name] == 0


@pytest.mark.parametrize("function", [lambda x, w: (x @ w).softmax(-1), lambda x, w: x.softmax(-1) @ w])
def test_softmax_without_matmuls_on_both_sides_is_left_without_a_word(
    function: Any, compiled: Callable[..., Any]
) -> None:
    x, w = torch.randn(3, 5), torch.randn(5, 5)
    out, report = compiled(function, x, w, pipeline=ShieldSoftmax.name)
    assert report.counts[ShieldSoftmax.name] == 0
    assert not report.rejected
    torch.testing.assert_close(out, function(x, w))
