"""Times of a decode step against every kernel of the library: a section of benchmarks/attention.py.

One query, 32 heads on 8 of keys and values, over caches of 1k to 128k tokens of 1 to 64 requests. Versions:
each kernel of SDPA by itself, FlexAttention at four shapes, every lowering of effopt, and those that read the
same cache in pages of 64 tokens. GB/s counts keys, values, query and result once; the aim is 85 % of what a
copy reaches, from 8k tokens on.
"""

from __future__ import annotations

from typing import Any

import peers
import torch
from prefill_section import figures, measured
from timing import medians
from torch import Tensor

from effopt.graph import ops

SECTION = "<!-- written by benchmarks/attention.py --section decode -->"
SIZES = {"cpu": (512,), "cuda": tuple(2**n for n in range(10, 18))}
HEAD_SIZES = (128, 64)
HEADS, KV_HEADS, PAGE = 32, 8, 64
BATCHES = {"cpu": (1, 2), "cuda": (1, 2, 4, 8, 16, 32, 64)}
FLEX = ((1, 8192), (16, 8192), (1, 131072), (16, 131072))
"""FlexAttention takes seconds to compile, once for each size."""
FREE_SHARE = 0.3
"""Keys and values take at most this share of the memory of a GPU, so that pages fit beside them."""


def measure(
    s: int, d: int, device: torch.device, dtype: torch.dtype, rounds: int, most: tuple[float, float]
) -> list[dict[str, Any]]:
    """All batches and versions of one cache."""
    rows = []
    for b in BATCHES[device.type]:
        needed = 2 * b * KV_HEADS * s * d * dtype.itemsize
        what = {"b": b, "t": s, "d": d}
        room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**33
        fits = needed <= FREE_SHARE * room
        if not fits:
            why = f"keys and values take {needed / 2**30:.0f} GiB"
            rows.append({**what, "version": "all", "why_not": why})
            continue
        rows += [{**what, **row} for row in _measure(b, s, d, device, dtype, rounds, most)]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _measure(
    b: int, s: int, d: int, device: torch.device, dtype: torch.dtype, rounds: int, most: tuple[float, float]
) -> list[dict[str, Any]]:
    q = torch.randn(b, HEADS, 1, d, device=device, dtype=dtype)
    k, v = (torch.randn(b, KV_HEADS, s, d, device=device, dtype=dtype) for _ in range(2))
    forms = versions(q, k, v)
    calls = {name: lambda form=form: form(q, k, v) for name, form in forms.items()}
    calls |= paged_versions(q, k, v)
    wanted = None
    if b * s <= 2**18:
        wanted = ops.attention.reference(*(x.float() for x in (q, k, v)), scale=d**-0.5)
    calls, refused = peers.that_run(calls, wanted, tolerance=2e-2)
    times = medians(calls, device, rounds)
    native = min((t for name, t in times.items() if name in peers.NATIVE), default=None)
    rows: list[dict[str, Any]] = [{"version": name, "why_not": why} for name, why in refused.items()]
    for name, seconds in times.items():
        flops, moved = 4.0 * b * HEADS * d * s, float(k.nbytes + v.nbytes + 2 * q.nbytes)
        share = moved / seconds / most[1]
        rows.append(measured(name, seconds, native, flops, moved) | {"of_ceiling": share})
    return rows


def versions(q: Tensor, k: Tensor, v: Tensor) -> peers.Calls:
    """By name, native kernels first."""
    (b, _, _, d), s = q.shape, k.shape[2]
    scale = d**-0.5
    found = peers.sdpa_versions(b * HEADS * s, scale=scale, enable_gqa=True)
    if b > 1 and b * s > 2**18:  # it repeats keys and values for all heads
        found.pop("sdpa, math", None)
    if q.device.type == "cuda" and (b, s) in FLEX and d == HEAD_SIZES[0]:
        found["flex"] = peers.once(lambda: peers.flex(None, 1, s, q.device, scale=scale, enable_gqa=True))
    return found | peers.lowerings(ops.attention, (q, k, v), False, scale=scale, rows_see_key=True)


def paged_versions(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """The same cache in pages, in an order of chance."""
    b, hkv, s, d = k.shape
    count = b * s // PAGE
    order = torch.randperm(count, device=k.device)
    pools = []
    for x in (k, v):
        pages = x.view(b, hkv, s // PAGE, PAGE, d).transpose(1, 2).reshape(count, hkv, PAGE, d)
        pools.append(torch.empty_like(pages).index_copy_(0, order, pages))
    table = order.view(b, s // PAGE).to(torch.int32)
    lengths = torch.full((b,), s, dtype=torch.int32, device=k.device)
    operands = (q, *pools, table, lengths)
    found = peers.lowerings(ops.paged_attention, operands, False, scale=d**-0.5)
    return {f"{name}, paged": lambda run=run: run(*operands) for name, run in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = "| b | s | d | version | ms | times as fast as the best native | TFLOP/s | GB/s | of copy |\n"
    head += "|--:|--:|--:|---|--:|--:|--:|--:|--:|\n"
    return head + "\n".join(f"| {r['b']} | {r['t']} | {r['d']} | {r['version']} |" + figures(r) for r in rows)
