"""Times of attention over selected blocks against dense SDPA: a section of benchmarks/attention.py.

Causal, each head and block of queries with random blocks, its own among them. Versions: `sdpa, is_causal`,
dense; and every lowering of `block_sparse_attention` that this device has but the reference, which makes all
scores. The blocks are given: choosing them is not in the times. `density` is that asked for, `counted` the
share of open pairs in selected blocks. FLOPs are those of the products of these pairs (of all open ones for
SDPA), bytes those of query, key, value and result, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import medians
from torch import Tensor
from torch.nn import functional as F

from effopt.graph import ops
from effopt.graph.ops.block_sparse_attention import blocks_in, share_of_pairs
from effopt.plugins.manager import build_registry
from effopt.target import target_of

SECTION = "<!-- written by benchmarks/attention.py --section block-sparse -->"
SIZES = {"cpu": (2048, 4096), "cuda": (4096, 16384, 65536)}
HEAD_SIZES = (64, 128)
DENSITIES = (0.05, 0.1, 0.25, 0.5)
HEADS, BLOCK = 8, 64


def random_blocks(t: int, density: float, device: torch.device) -> Tensor:
    """Selected blocks `[1, HEADS, n, n]`: of each row about `density` of those before it, and its own."""
    n = blocks_in(t, BLOCK)
    place = torch.arange(n, device=device)
    drawn = torch.rand(1, HEADS, n, n, device=device)
    drawn = drawn.masked_fill(place > place.unsqueeze(-1), -1.0)
    drawn.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    rank = drawn.argsort(-1, descending=True).argsort(-1)
    wanted = (density * (place + 1)).round().clamp(min=1).unsqueeze(-1)
    return (rank < wanted) & (drawn >= 0)


def versions(
    q: Tensor, k: Tensor, v: Tensor, blocks: dict[float, Tensor]
) -> dict[tuple[str, float], Callable[[], Tensor]]:
    """By name and density, the dense one first."""
    scale = q.shape[-1] ** -0.5
    calls: dict[tuple[str, float], Callable[[], Tensor]] = {
        ("sdpa, is_causal", 1.0): lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    }
    op, target = ops.block_sparse_attention, target_of(q.device)
    for density, selected in blocks.items():
        given: dict[str, Any] = {"block": BLOCK, "scale": scale, "is_causal": True, "density": density}
        operands = op.bind((q, k, v, selected), given)
        for lowering in build_registry().lowerings[op.name]:
            if lowering.name != "reference" and lowering.supports(target, operands) is None:
                run = lowering.run
                calls[lowering.name, density] = lambda run=run, s=selected, g=given: run(q, k, v, s, **g)
    return calls


def measure(
    t: int, d: int, device: torch.device, dtype: torch.dtype, rounds: int, most: tuple[float, float]
) -> list[dict[str, Any]]:
    """All densities and versions of one shape, in turn."""
    q, k, v = (torch.randn(1, HEADS, t, d, device=device, dtype=dtype) for _ in range(3))
    blocks = {density: random_blocks(t, density, device) for density in DENSITIES}
    calls = versions(q, k, v, blocks)
    if t <= 4096:
        check(q, k, v, blocks, calls)
    times = medians({f"{name}|{density}": call for (name, density), call in calls.items()}, device, rounds)
    dense = times["sdpa, is_causal|1.0"]
    rows = []
    for name, density in calls:
        seconds = times[f"{name}|{density}"]
        held = blocks.get(density)
        counted = 1.0 if held is None else share_of_pairs(held, t, t, BLOCK, is_causal=True)
        flops = 4.0 * HEADS * d * counted * t * (t + 1) / 2
        reached = flops / seconds, 4.0 * q.nbytes / seconds
        rows.append(
            {
                "t": t,
                "d": d,
                "version": name,
                "density": density,
                "counted": counted,
                "milliseconds": 1e3 * seconds,
                "ratio": dense / seconds,
                "gflops": flops / 1e9,
                "gflops_per_s": reached[0] / 1e9,
                "gbytes_per_s": reached[1] / 1e9,
                "of_ceiling": max(reached[0] / most[0], reached[1] / most[1]),
            }
        )
    return rows


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: dict[float, Tensor],
    calls: dict[tuple[str, float], Callable[[], Tensor]],
) -> None:
    """Compare every version with the reference."""
    tolerance = 1e-4 if q.dtype == torch.float32 else 2e-2
    for density, selected in blocks.items():
        given: dict[str, Any] = {"block": BLOCK, "scale": q.shape[-1] ** -0.5, "is_causal": True}
        wanted = ops.block_sparse_attention.reference(q, k, v, selected, **given)
        for (_, of), call in calls.items():
            if of == density:
                torch.testing.assert_close(call(), wanted, rtol=tolerance, atol=tolerance)


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = "| t | d | version | density | counted | ms | times as fast as dense | GFLOP | GFLOP/s | GB/s |"
    head += " of ceiling |\n|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    return head + "\n".join(
        f"| {r['t']} | {r['d']} | {r['version']} | {r['density']:.2f} | {r['counted']:.3f} |"
        f" {r['milliseconds']:.2f} | {r['ratio']:.2f} | {r['gflops']:.2f} | {r['gflops_per_s']:.1f} |"
        f" {r['gbytes_per_s']:.1f} | {r['of_ceiling']:.2f} |"
        for r in rows
    )
