"""The kernel over pages against the op's reference in float64, and what it does not read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from effopt.backends.base import choose
from effopt.backends.reference import reference_lowering
from effopt.backends.triton import paged_attention
from effopt.backends.triton.paged_attention import PAGED_ATTENTION
from effopt.graph import ops
from effopt.target import Target
from tests.backends.triton.calls import H100, assert_near, double

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def few_keys_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short requests, too, in parts, some of which are empty."""
    monkeypatch.setattr(paged_attention, "parts", lambda tiles, keys: max(1, min(3, keys // 20)))


def call_of(
    lengths: list[int],
    device: torch.device,
    *,
    page: int = 16,
    h: int = 4,
    hkv: int = 2,
    t: int = 1,
    **given: Any,
) -> tuple[Tensor, ...]:
    """Pages in shuffled order, the first of them twice; entries beyond a length are no pages."""
    d, dtype = given.get("d", 16), given.get("dtype", torch.float32)
    room, b = -(-max(*lengths, 1) // page) + 1, len(lengths)
    pages = b * room + 1
    q = torch.randn(b, h, t, d, device=device, dtype=dtype)
    k = torch.randn(pages, hkv, page, d, device=device, dtype=dtype)
    v = torch.randn(pages, hkv, page, given.get("dv", d), device=device, dtype=dtype)
    table = torch.randperm(pages)[: b * room].view(b, room)
    table[:, 1:2] = table[:, :1]
    held = torch.tensor(lengths)
    table[torch.arange(room) * page >= held[:, None]] = -7
    return q, k, v, table.int().to(device), held.int().to(device)


def assert_paged(args: tuple[Tensor, ...], **more: Any) -> None:
    named = {"scale": 0.3, **more}
    got = PAGED_ATTENTION.call(*args, **named)
    exact = ops.paged_attention.reference(*map(double, args[:3]), *args[3:], **named)
    assert_near(got, exact, args[0].dtype)
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_samples(dtype: torch.dtype, device: torch.device) -> None:
    for sample in ops.paged_attention.samples(dtype, device):
        assert_paged(sample.args, **sample.kwargs)


@pytest.mark.parametrize("page", [1, 7, 64, 100])
@pytest.mark.parametrize("t", [1, 5])
def test_pages_and_lengths(page: int, t: int, device: torch.device) -> None:
    """No key, one, a whole page, one more, and many; fewer keys than queries."""
    assert_paged(call_of([0, 1, page, page + 1, 70, 133], device, page=page, t=t))


@pytest.mark.parametrize("d", [16, 17, 80, 129, 256])
def test_head_sizes(d: int, device: torch.device) -> None:
    assert_paged(call_of([0, 3, 65], device, d=d, dv=d // 2 + 1, h=3, hkv=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_grouped_queries_of_several_tiles(dtype: torch.dtype, device: torch.device) -> None:
    """More rows than a tile has; soft-cap; and one part alone."""
    args = call_of([40, 17], device, h=6, hkv=1, t=12, dtype=dtype)
    assert_paged(args, softcap=2.0)
    assert_paged(call_of([19], device, h=1, hkv=1, page=3, dtype=dtype))


def test_pools_of_other_strides(device: torch.device) -> None:
    """Pages as `[pages, page, hkv, d]`, a table that is a part of a wider one, lengths in int64."""
    q, k, v, table, lengths = call_of([5, 40], device)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    wide = torch.cat([table, table], 1)[:, : table.shape[1]]
    turned = table.t().contiguous().t()
    for other in (wide, turned, table.long()):
        assert_paged((q.mT.contiguous().mT, k, v, other, lengths.long()))
    assert_paged((q, k, v, table[:, :1], lengths))  # the second request goes beyond its table
    assert_paged((q, k, v, table, torch.tensor([-3, 2**40], device=device)[:1].expand(2)))


def test_what_is_beyond_a_length_is_not_read(device: torch.device) -> None:
    """NaN behind the last key of a page, and in pages of no request, changes no bit."""
    q, k, v, table, lengths = call_of([0, 5, 33, 90], device)
    spoiled = [torch.full_like(x, math.nan) for x in (k, v)]
    for i, length in enumerate(lengths.tolist()):
        for j in range(length):
            at = (int(table[i, j // 16]), slice(None), j % 16)
            for x, whole in zip(spoiled, (k, v), strict=True):
                x[at] = whole[at]
    expected = PAGED_ATTENTION.call(q, k, v, table, lengths, scale=0.3)
    assert expected.isfinite().all()
    assert torch.equal(expected[0], torch.zeros_like(expected[0]))
    assert torch.equal(PAGED_ATTENTION.call(q, *spoiled, table, lengths, scale=0.3), expected)
    reference = ops.paged_attention.reference(q, *spoiled, table, lengths, scale=0.3)
    torch.testing.assert_close(reference, expected, rtol=2e-5, atol=1e-5)


def test_a_page_outside_of_the_pool_is_not_silent(device: torch.device) -> None:
    q, k, _, table, lengths = call_of([40, 40], device)
    for page, size in ((-1, 16), (len(k), 16), (len(k), 64)):
        wrong = table.clone()
        wrong[1, 0] = page
        pools = [torch.randn(len(k), 2, size, 16, device=device) for _ in range(2)]
        got = PAGED_ATTENTION.call(q, *pools, wrong, lengths, scale=0.3)
        assert got[0].isfinite().all()
        assert got[1].isnan().all()


def test_no_rows_and_large_scores(device: torch.device) -> None:
    args = call_of([9, 9], device)
    empty = PAGED_ATTENTION.call(args[0][:0], *args[1:3], args[3][:0], args[4][:0], scale=0.3)
    assert empty.shape == (0, 4, 1, 16)
    assert_paged(args, scale=1e4)
    args[1][..., 0] = math.nan
    assert PAGED_ATTENTION.call(*args, scale=0.3).isnan().any()


def test_the_same_bits_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    args = call_of([3, 100, 64], device)
    first, second = (PAGED_ATTENTION.call(*args, scale=0.3) for _ in range(2))
    assert torch.equal(first, second)
    for number in (1, 7):
        monkeypatch.setattr(paged_attention, "parts", lambda tiles, keys, n=number: n)
        torch.testing.assert_close(PAGED_ATTENTION.call(*args, scale=0.3), first, rtol=2e-5, atol=1e-5)


def test_opcheck_and_symbolic_sizes(device: torch.device) -> None:
    args = call_of([3, 40], device)
    torch.library.opcheck(torch.ops.effopt_triton.paged_attention.default, args, {"scale": 0.3})
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda *given: PAGED_ATTENTION.call(*given, scale=0.3),
        backend=aot_autograd(fw_compiler=count),
        fullgraph=True,
        dynamic=True,
    )
    for lengths in ([3, 40, 75], [3, 40], [90, 1, 0, 7]):
        other = call_of(lengths, device)
        torch.testing.assert_close(compiled(*other), PAGED_ATTENTION.call(*other, scale=0.3))
    assert len(graphs) == 1


Q, K = torch.zeros(2, 4, 1, 8), torch.zeros(5, 2, 16, 8)
T, N = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
REFUSED: dict[str, tuple[tuple[Tensor, ...], str]] = {
    "float64": ((Q.double(), K.double(), K.double(), T, N), "float32 or narrower"),
    "mixed dtypes": ((Q.half(), K, K, T, N), "wants one floating dtype"),
    "long heads": ((Q[..., :1].expand(2, 4, 1, 257), K[..., :1].expand(5, 2, 16, 257), K, T, N), "1 to 256"),
    "pools that differ": ((Q, K, K[:4], T, N), "wants [b, h, t, d]"),
    "heads that do not group": ((Q[:, :3], K, K, T, N), "h a multiple of hkv"),
    "a table of floats": ((Q, K, K, T.float(), N), "page_table is torch.float32"),
    "a table of other requests": ((Q, K, K, T[:1], N), "wants [b, h, t, d]"),
    "lengths of each page": ((Q, K, K, T, T), "4, 4, 4, 2 and 1"),
    "no page in a table": ((Q, K, K, T[:, :0], N), "at least one page"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_says_why_and_the_call_raises(case: str) -> None:
    args, expected = REFUSED[case]
    bound = ops.paged_attention.bind(args, {"scale": 1.0})
    assert expected in (PAGED_ATTENTION.supports(H100, bound) or "")
    with pytest.raises(ValueError, match=r"wants"):
        PAGED_ATTENTION.call(*args, scale=1.0)
    if case not in ("float64", "long heads"):
        with pytest.raises(ValueError, match=r"paged_attention: .* wants"):
            ops.paged_attention.overload(*args, scale=1.0)


def test_which_lowering_is_chosen() -> None:
    candidates = [PAGED_ATTENTION, reference_lowering(ops.paged_attention)]
    for b, room in ((8, 64), (64, 512)):
        given = torch.zeros(b, 32, 1, 128), torch.zeros(1000, 8, 16, 128)
        bound = ops.paged_attention.bind(
            (given[0], given[1], given[1], torch.zeros(b, room).int(), torch.zeros(b).int()), {"scale": 1.0}
        )
        for target, name in ((H100, "triton"), (Target("cpu", "cpu", 1e10, 1e11), "reference")):
            assert choose(candidates, target, bound, given[0], False).lowering.name == name
