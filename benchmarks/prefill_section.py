"""Times of prefill against every kernel of the library: a section of benchmarks/attention.py, for a GPU.

Causal, and a causal window of 1,024; one sequence, and as many as make 16k tokens; forward, and for the
causal one forward and backward. Versions: each kernel of SDPA by itself (a window as a dense mask, up to 8k),
the library's flash kernel with a window, FlexAttention at three sizes, and every lowering of effopt. FLOPs
are those of open pairs (3.5 times as many with the backward pass), bytes query, key, value and result once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import torch
from timing import medians
from torch import Tensor

from effopt.graph import ops
from effopt.graph.ops.attention import open_keys

SECTION = "<!-- written by benchmarks/attention.py --section prefill -->"
SIZES = {"cpu": (256,), "cuda": (1024, 2048, 4096, 8192, 16384, 32768)}
HEAD_SIZES = (64, 128)
HEADS, TOKENS, WINDOW = 16, 16384, 1024
FLEX_SIZES = (2048, 8192, 32768)
"""FlexAttention takes seconds to compile, once for each size."""
MOST_MASK = 8192
"""Tokens up to which a window is given as a dense mask."""


def told(kind: str) -> dict[str, Any]:
    """What the op is told of a mask."""
    if kind == "causal":
        return {"is_causal": True, "rows_see_key": True}
    return {"low": 1 - WINDOW, "high": 0, "rows_see_key": True}


def versions(kind: str, q: Tensor, k: Tensor, v: Tensor, training: bool) -> peers.Calls:
    """By name, native kernels first."""
    b, h, t, d = q.shape
    scale, found = d**-0.5, {}
    if kind == "causal":
        found = peers.sdpa_versions(b * h * t * t, is_causal=True, scale=scale)
    else:
        found["flash, window"] = peers.flash_window(WINDOW, scale)
        if t <= MOST_MASK:
            mask = open_keys(t, t, q.device, low=1 - WINDOW, high=0)
            found |= peers.sdpa_versions(b * h * t * t, attn_mask=mask, scale=scale)
    if training:
        found.pop("flash, window", None)
    elif q.device.type == "cuda" and b == 1 and t in FLEX_SIZES:
        near = (lambda i, j: i >= j) if kind == "causal" else (lambda i, j: (i >= j) & (i - j < WINDOW))
        found["flex"] = peers.once(
            lambda: peers.flex(lambda b, h, i, j: near(i, j), t, t, q.device, scale=scale)
        )
    given = told(kind)
    return found | peers.lowerings(ops.attention, (q, k, v), training, scale=scale, **given)


def measure(
    t: int, d: int, device: torch.device, dtype: torch.dtype, rounds: int, most: tuple[float, float]
) -> list[dict[str, Any]]:
    """All kinds, batches, passes and versions of one length."""
    rows = []
    for kind in ("causal", f"window {WINDOW}"):
        for b in sorted({1, max(1, TOKENS // t)} if device.type == "cuda" else {1}):
            for training in (False, True) if kind == "causal" else (False,):
                rows += _measure(kind, b, t, d, training, device, dtype, rounds, most)
    return rows


def _measure(
    kind: str,
    b: int,
    t: int,
    d: int,
    training: bool,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    most: tuple[float, float],
) -> list[dict[str, Any]]:
    q, k, v, upstream = (torch.randn(b, HEADS, t, d, device=device, dtype=dtype) for _ in range(4))
    forms = versions(kind, q, k, v, training)
    calls: dict[str, Callable[[], Any]]
    if training:
        leaves = tuple(x.requires_grad_() for x in (q, k, v))
        calls = {name: _step(form, leaves, upstream) for name, form in forms.items()}
    else:
        calls = {name: lambda form=form: form(q, k, v) for name, form in forms.items()}
    with torch.set_grad_enabled(training):
        # Up to 2k the reference decides, later the first native kernel that runs.
        wanted = calls_reference(kind, q, k, v) if t <= 2048 and not training else None
        calls, refused = peers.that_run(calls, wanted, tolerance=2e-2)
        times = medians(calls, device, rounds)
    near = min(t, WINDOW) if kind != "causal" else t
    pairs = near * (near + 1) / 2 + (t - near) * near
    flops = (3.5 if training else 1.0) * 4.0 * b * HEADS * d * pairs
    native = min((s for name, s in times.items() if name in peers.NATIVE), default=None)
    what = {"kind": kind, "b": b, "t": t, "d": d, "direction": "both" if training else "forward"}
    rows = [{**what, "version": name, "why_not": why} for name, why in refused.items()]
    for name, seconds in times.items():
        moved = (2.0 if training else 1.0) * 4.0 * q.nbytes
        share = max(flops / seconds / most[0], moved / seconds / most[1])
        rows.append({**what, **measured(name, seconds, native, flops, moved), "of_ceiling": share})
    return rows


def measured(
    version: str, seconds: float, native: float | None, flops: float, moved: float
) -> dict[str, Any]:
    """What a row says of one version; `native` are the seconds of the fastest of the library's."""
    return {
        "version": version,
        "milliseconds": 1e3 * seconds,
        "ratio": None if native is None else native / seconds,
        "tflops_per_s": flops / seconds / 1e12,
        "gbytes_per_s": moved / seconds / 1e9,
    }


def calls_reference(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The op's own result, in float32."""
    out: Tensor = ops.attention.reference(
        *(x.float() for x in (q, k, v)), scale=q.shape[-1] ** -0.5, **told(kind)
    )
    return out


def _step(form: Callable[..., Tensor], leaves: tuple[Tensor, ...], upstream: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(form(*leaves), leaves, upstream)


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = "| mask | b | t | d | pass | version | ms | times as fast as the best native | TFLOP/s | GB/s |"
    head += " of ceiling |\n|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|\n"
    return head + "\n".join(
        f"| {r['kind']} | {r['b']} | {r['t']} | {r['d']} | {r['direction']} | {r['version']} |" + figures(r)
        for r in rows
    )


def figures(r: dict[str, Any]) -> str:
    """The last five cells of a row, or why there are none."""
    if "why_not" in r:
        return f" {r['why_not']} | | | | |"
    ratio = "-" if r["ratio"] is None else format(r["ratio"], ".2f")
    return (
        f" {r['milliseconds']:.3f} | {ratio} | {r['tflops_per_s']:.1f} | {r['gbytes_per_s']:.0f} |"
        f" {r['of_ceiling']:.2f} |"
    )
