"""What only a GPU shows: sizes of real models, offsets beyond 32 bits, launches inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.backends.triton import LOWERINGS
from effopt.backends.triton.flash_attention import FLASH_ATTENTION
from effopt.graph import ops
from tests.backends.triton.calls import H100

CUDA = torch.device("cuda")
OTHERS = ("block_sparse_attention", "paged_attention", "linear_attention", "selective_scan")
"""Ops whose kernels have no test of large sizes in a file of their own."""


def operands(name: str, t: int, d: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of an op in bfloat16 over `t` tokens, with heads or states of `d`."""

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=torch.bfloat16)

    if name == "block_sparse_attention":
        n = -(-t // 64)
        blocks = (torch.rand(1, 4, n, n, device=device) < 0.2) | torch.eye(n, device=device).bool()
        made = draw(1, 4, t, d), draw(1, 2, t, d), draw(1, 2, t, d), blocks
        return made, {"block": 64, "scale": d**-0.5, "is_causal": True}
    if name == "paged_attention":
        table = torch.randperm(2 * (t // 16), device=device).view(2, -1).to(torch.int32)
        lengths = torch.tensor([t, t // 3], device=device, dtype=torch.int32)
        pools = draw(table.numel(), 2, 16, d), draw(table.numel(), 2, 16, d)
        return (draw(2, 8, 1, d), *pools, table, lengths), {"scale": d**-0.5}
    if name == "linear_attention":
        q, k, v = (draw(1, t, 4, d).transpose(1, 2) for _ in range(3))
        return (q, k, v), {"scale": d**-0.5, "decay": -0.1 * torch.rand(1, 4, t, device=device)}
    if name == "selective_scan":
        u, delta, a = draw(2, d, t), draw(2, d, t).sigmoid(), -torch.rand(d, 16, device=device)
        return (u, delta, a, draw(2, 16, t), draw(2, 16, t)), {}
    made = draw(1, 8, t, d), draw(1, 2, t, d), draw(1, 2, t, d)
    return made, {"scale": d**-0.5, "is_causal": True}


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def assert_large(lowering: Lowering, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Near the reference in float32, relative to the largest value."""
    wide = (x.float() if x.is_floating_point() else x for x in args)
    wanted = first(lowering.op.reference(*wide, **kwargs))
    got = first(lowering.run(*args, **kwargs)).float()
    assert float((got - wanted).abs().max()) <= 2e-2 * float(wanted.abs().max())


def assert_far_heads(heads: int, s: int, d: int, device: torch.device) -> None:
    """The last head of keys that begins behind 2**31 elements is as that head alone."""
    q = torch.randn(1, heads, 1, d, device=device, dtype=torch.bfloat16)
    k = torch.zeros(1, heads, s, d, device=device, dtype=torch.bfloat16)
    k[:, -1].normal_()
    whole = FLASH_ATTENTION.call(q, k, k, scale=d**-0.5)
    alone = FLASH_ATTENTION.call(q[:, -1:], k[:, -1:], k[:, -1:], scale=d**-0.5)
    torch.testing.assert_close(whole[:, -1:], alone, rtol=1e-2, atol=1e-2)
    assert float(whole[:, :-1].abs().max()) == 0.0


def captured(call: Callable[[], Any]) -> Tensor:
    """The result of a replay, after the memory of the first run was overwritten."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = first(call())
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return out


def of_op(name: str) -> list[Lowering]:
    return [low for low in LOWERINGS if low.op.name == name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OTHERS)
def test_large_on_gpu(name: str) -> None:
    for t, d in ((2048, 128), (4096, 64)):
        args, kwargs = operands(name, t, d, CUDA)
        for lowering in of_op(name):
            assert_large(lowering, args, kwargs)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    assert_far_heads(129, 2**17, 128, CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*OTHERS, "attention"])
def test_in_cuda_graphs(name: str) -> None:
    """No launch waits for the device, and none takes memory that a graph does not own."""
    args, kwargs = operands(name, 512, 64, CUDA)
    for lowering in of_op(name):
        if lowering.supports(H100, lowering.op.bind(args, kwargs)) is None:
            wanted = first(lowering.run(*args, **kwargs))
            got = captured(lambda run=lowering.run: run(*args, **kwargs))
            torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.0)


@pytest.mark.gpu
def test_with_less_overhead() -> None:
    """Inductor's graphs of CUDA, over what effopt lowered: the third run is a replay."""
    (q, k, v), kwargs = operands("attention", 512, 64, CUDA)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    run = torch.compile(model, backend="effopt", options={"inductor": {"triton.cudagraphs": True}})
    with torch.no_grad():
        for _ in range(3):
            got = run(q, k, v).clone()
    wanted = ops.attention.reference(q.float(), k.float(), v.float(), **kwargs)
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", [*OTHERS, "attention"])
def test_the_same_at_small_sizes(name: str, device: torch.device) -> None:
    """What the tests above compare, where it can be compared without a GPU."""
    args, kwargs = operands(name, 96, 16, device)
    lowering = of_op(name)[0]
    assert lowering.supports(H100, lowering.op.bind(args, kwargs)) is None
    assert_large(lowering, args, kwargs)


def test_far_heads_at_small_sizes(device: torch.device) -> None:
    assert_far_heads(3, 20, 16, device)
