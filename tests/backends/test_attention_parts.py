"""Parts of one attention, each with its log-sum-exp, joined: the attention over all keys in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends.attention_parts import LOWERINGS, flash_lse
from effopt.graph import ops
from effopt.target import target_of

INF = float("inf")
attention_lse, merge = ops.attention_lse.reference, ops.merge_attention.reference
CALLS = {"reference": attention_lse, "cpu-flash": flash_lse}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def heads(t: int, s: int, b: int = 2, h: int = 4, hkv: int = 2, d: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((b, h, t, d), (b, hkv, s, d), (b, hkv, s, d))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def joined(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *cuts: int, **given: Any) -> Any:
    """The union of the parts of keys between `cuts`."""
    ends = [0, *cuts, k.shape[2]]
    found = None
    for first, stop in itertools.pairwise(ends):
        told = {n: x if n != "mask" else x[..., first:stop] for n, x in given.items()}
        told |= {n: told[n] - first for n in ("low", "high") if n in told}
        part = call(q, k[:, :, first:stop], v[:, :, first:stop], scale=0.3, **told)
        found = part if found is None else merge(*found, *part)
    return found


@every_call
@pytest.mark.parametrize("cuts", [(1,), (63,), (20, 21, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parts_are_the_whole(call: Callable[..., Any], cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in heads(5, 100))
    got = joined(call, q, k, v, *cuts, low=-3, high=90)
    given = {"scale": 0.3, "low": -3, "high": 90}
    exact = ops.attention.reference(q.double(), k.double(), v.double(), **given)
    allowed = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got[0].double(), exact, **allowed)
    wide = (q.double() @ k.double().repeat_interleave(2, 1).mT) * 0.3
    apart = torch.arange(100) - torch.arange(5)[:, None]
    open_ = wide.masked_fill((apart < -3) | (apart > 90), -INF).logsumexp(-1)
    torch.testing.assert_close(got[1].double(), open_, **allowed)
    assert got[1].dtype == torch.promote_types(dtype, torch.float32)


@every_call
def test_rows_without_keys(call: Callable[..., Any]) -> None:
    """Blind in one part: the other's result. Blind in both: 0 and -inf."""
    q, k, v = heads(3, 8)
    mask = torch.ones(2, 1, 3, 8, dtype=torch.bool)
    mask[:, :, 0, :5] = False
    mask[:, :, 1, 5:] = False
    mask[:, :, 2] = False
    out, lse = joined(call, q, k, v, 5, mask=mask)
    first = call(q, k[:, :, :5], v[:, :, :5], scale=0.3)
    last = call(q, k[:, :, 5:], v[:, :, 5:], scale=0.3)
    for row, part in ((0, last), (1, first)):
        torch.testing.assert_close(out[:, :, row], part[0][:, :, row])
        torch.testing.assert_close(lse[:, :, row], part[1][:, :, row])
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, :, 2] == -INF).all()


def test_what_a_blind_part_holds_is_not_read() -> None:
    out, lse = torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2)
    nan, none = torch.full_like(out, float("nan")), torch.full_like(lse, -INF)
    torch.testing.assert_close(merge(out, lse, nan, none), (out, lse))
    torch.testing.assert_close(merge(nan, none, out, lse), (out, lse))


def test_gradients_of_parts_are_those_of_the_whole() -> None:
    q, k, v = (x.requires_grad_() for x in heads(4, 12))
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[2, :7], mask[3] = False, False
    (whole,) = torch.autograd.grad(
        ops.attention.reference(q, k, v, scale=0.3, mask=mask, zero_masked_rows=True).square().sum(), [q]
    )
    (parts,) = torch.autograd.grad(joined(attention_lse, q, k, v, 7, mask=mask)[0].square().sum(), [q])
    torch.testing.assert_close(parts, whole)
    assert not whole.isnan().any()


def test_sinks_belong_to_one_part() -> None:
    q, k, v = heads(4, 12)
    sinks = torch.randn(4, dtype=torch.float64)
    one = attention_lse(q, k[:, :, :5], v[:, :, :5], scale=0.3, sinks=sinks)
    both = merge(*one, *attention_lse(q, k[:, :, 5:], v[:, :, 5:], scale=0.3))
    torch.testing.assert_close(both[0], ops.attention.reference(q, k, v, scale=0.3, sinks=sinks))


@pytest.mark.parametrize(("t", "s"), [(0, 5), (5, 0), (0, 0)])
def test_sizes_of_zero_are_not_for_the_library_kernel(t: int, s: int) -> None:
    """It divides by them, and the process dies (torch 2.13)."""
    (lowering,) = LOWERINGS
    said = lowering.supports(
        target_of(torch.device("cpu")), ops.attention_lse.bind(heads(t, s), {"scale": 0.3})
    )
    assert said is not None
    assert "a size that is 0" in said


def test_an_empty_part_after_a_shared_prefix() -> None:
    def over_prefix(q: Tensor, prefix: Tensor, own: Tensor) -> Tensor:
        k = torch.cat([prefix.expand(q.shape[0], -1, -1, -1), own], dim=2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    torch._dynamo.reset()
    q, prefix, own = torch.randn(8, 4, 1, 16), torch.randn(1, 4, 200, 16), torch.randn(8, 4, 0, 16)
    with torch.no_grad():
        got = torch.compile(over_prefix, backend="effopt")(q, prefix, own)
        torch.testing.assert_close(got, over_prefix(q, prefix, own), rtol=1e-5, atol=1e-5)
