"""Times of attention over selected blocks against dense SDPA: a section of benchmarks/attention.py.

Causal, each head and block of queries with random blocks, its own among them. Versions: `sdpa, is_causal`,
dense, and on a GPU the library's kernels one by one, of which the fastest is what `dense` means;
FlexAttention at one length and density; and every lowering of `block_sparse_attention` that this device has
but the reference, which makes all scores. The blocks are given: choosing them is not in the times. `density`
is that asked for, `counted` the share of open pairs in selected blocks. FLOPs are those of the products of
these pairs (of all open ones for SDPA), bytes those of query, key, value and result, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import torch
from timing import medians
from torch import Tensor
from torch.nn import functional as F

from effopt.graph import ops
from effopt.graph.ops.block_sparse_attention import blocks_in, share_of_pairs

SECTION = "<!-- written by benchmarks/attention.py --section block-sparse -->"
SIZES = {"cpu": (2048, 4096), "cuda": (4096, 8192, 32768, 65536, 131072)}
HEAD_SIZES = (64, 128)
DENSITIES = (0.05, 0.1, 0.25, 0.5)
HEADS = 8
BLOCKS = {"cpu": (64,), "cuda": (64, 128)}
FLEX = (32768, 128, 0.1)
"""Tokens, block and density at which FlexAttention is compiled, which takes seconds."""


def random_blocks(t: int, block: int, density: float, device: torch.device) -> Tensor:
    """Selected blocks `[1, HEADS, n, n]`: of each row about `density` of those before it, and its own."""
    n = blocks_in(t, block)
    place = torch.arange(n, device=device)
    drawn = torch.rand(1, HEADS, n, n, device=device)
    drawn = drawn.masked_fill(place > place.unsqueeze(-1), -1.0)
    drawn.diagonal(dim1=-2, dim2=-1).fill_(2.0)
    rank = drawn.argsort(-1, descending=True).argsort(-1)
    wanted = (density * (place + 1)).round().clamp(min=1).unsqueeze(-1)
    return (rank < wanted) & (drawn >= 0)


def versions(
    q: Tensor, k: Tensor, v: Tensor, blocks: dict[float, Tensor], block: int
) -> dict[tuple[str, float], Callable[[], Tensor]]:
    """By name and density, dense ones first."""
    scale, t = q.shape[-1] ** -0.5, q.shape[2]
    dense: peers.Calls = {
        "sdpa, is_causal": lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, scale=scale)
    }
    if q.device.type == "cuda":
        dense |= peers.sdpa_versions(HEADS * t * t, is_causal=True, scale=scale)
    calls: dict[tuple[str, float], Callable[[], Tensor]] = {
        (name, 1.0): lambda run=run: run(q, k, v) for name, run in dense.items()
    }
    for density, selected in blocks.items():
        given: dict[str, Any] = {"block": block, "scale": scale, "is_causal": True, "density": density}
        found = peers.lowerings(ops.block_sparse_attention, (q, k, v, selected), False, **given)
        for name, run in found.items():
            calls[name.removeprefix("effopt, "), density] = lambda run=run, s=selected: run(q, k, v, s)
        if q.device.type == "cuda" and (t, block, density) == FLEX:
            run = peers.once(lambda selected=selected: flex(selected, block, scale))
            calls["flex", density] = lambda run=run: run(q, k, v)
    return calls


def flex(selected: Tensor, block: int, scale: float) -> Callable[..., Tensor]:
    """FlexAttention over the same blocks: whole ones, and those on the diagonal."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    own = torch.eye(selected.shape[-1], dtype=torch.bool, device=selected.device).expand_as(selected)
    lists = []
    for blocks in (own, selected & ~own):
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        lists += [blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)]
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=lambda b, h, i, j: i >= j)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, scale=scale)


def measure(
    t: int, d: int, device: torch.device, dtype: torch.dtype, rounds: int, most: tuple[float, float]
) -> list[dict[str, Any]]:
    """All blocks, densities and versions of one shape, in turn."""
    return [
        {**row, "block": block}
        for block in BLOCKS[device.type]
        for row in _measure(t, d, block, device, dtype, rounds, most)
    ]


def _measure(
    t: int,
    d: int,
    block: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    most: tuple[float, float],
) -> list[dict[str, Any]]:
    q, k, v = (torch.randn(1, HEADS, t, d, device=device, dtype=dtype) for _ in range(3))
    blocks = {density: random_blocks(t, block, density, device) for density in DENSITIES}
    calls, refused = versions(q, k, v, blocks, block), {}
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for density in (1.0, *blocks):
        wanted = None
        if t <= 4096 and density in blocks:
            given: dict[str, Any] = {"block": block, "scale": d**-0.5, "is_causal": True}
            wanted = ops.block_sparse_attention.reference(q, k, v, blocks[density], **given)
        of_density = {name: call for (name, of), call in calls.items() if of == density}
        for name, why in peers.that_run(of_density, wanted, tolerance)[1].items():
            del calls[name, density]
            refused[name, density] = why
    times = medians({f"{name}|{density}": call for (name, density), call in calls.items()}, device, rounds)
    dense = min(times[f"{name}|1.0"] for name, density in calls if density == 1.0)
    rows: list[dict[str, Any]] = [
        {"t": t, "d": d, "version": name, "density": density, "why_not": why}
        for (name, density), why in refused.items()
    ]
    for name, density in calls:
        seconds = times[f"{name}|{density}"]
        held = blocks.get(density)
        counted = 1.0 if held is None else share_of_pairs(held, t, t, block, is_causal=True)
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


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = "| t | d | version | density | counted | ms | times as fast as dense | GFLOP | GFLOP/s | GB/s |"
    head += " of ceiling |\n|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    return head + "\n".join(_line(r) for r in rows)


def _line(r: dict[str, Any]) -> str:
    version = r["version"] if r["block"] == BLOCKS["cpu"][0] else f"{r['version']}, blocks of {r['block']}"
    text = f"| {r['t']} | {r['d']} | {version} | {r['density']:.2f} |"
    if "why_not" in r:
        return f"{text} {r['why_not']} | | | | | | |"
    return (
        f"{text} {r['counted']:.3f} | {r['milliseconds']:.2f} | {r['ratio']:.2f} | {r['gflops']:.2f} |"
        f" {r['gflops_per_s']:.1f} | {r['gbytes_per_s']:.1f} | {r['of_ceiling']:.2f} |"
    )
