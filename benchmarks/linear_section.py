"""Times of causal linear attention in its forms: a section of benchmarks/attention.py.

Versions: `quadratic`, `tril(q k^T) v` as models write it, the baseline; `quadratic, inductor`, the same
compiled by Inductor; `quadratic, effopt`, the same compiled by effopt; `cumulative`, the states of all tokens
by `cumsum`, left out where they take more than 1 GiB; every lowering of `linear_attention` that this device
has but the reference; and `fla`, where flash-linear-attention is installed and the device is a GPU. Each is
compared with the op's reference first, up to 4,096 tokens. FLOPs are those of tokens one by one, the fewest:
4 d dv a token and head, so that a quadratic form shows what its pairs cost. Bytes are query, key, value and
result, each once.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from timing import medians
from torch import Tensor

from effopt.graph import ops
from effopt.plugins.manager import build_registry
from effopt.target import target_of

SECTION = "<!-- written by benchmarks/attention.py --section linear -->"
SIZES = {"cpu": (1024, 2048, 4096), "cuda": (2048, 8192, 32768)}
HEAD_SIZES = (64,)
HEADS = 8
_MOST_STATES, _MOST_PAIRS = 2**30, 2**33
"""Bytes of float32 states, and of float32 weights, above which a form is left out."""


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5
    return torch.matmul(torch.matmul(q * scale, k.transpose(-2, -1)).tril(), v)


def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return torch.matmul((q * q.shape[-1] ** -0.5).unsqueeze(-2), states).squeeze(-2)


def fla_or_why(device: torch.device) -> tuple[Callable[..., Tensor] | None, str]:
    """flash-linear-attention's chunked form, or why it is not timed."""
    if importlib.util.find_spec("fla") is None:
        return None, "fla: not timed, flash-linear-attention is not installed"
    if device.type != "cuda":
        return None, "fla: not timed, its kernels run on a GPU"
    chunked = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # It wants `[b, t, h, d]`; these are views, and what it copies is in its time.
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = chunked(q, k, v, scale=q.shape[-1] ** -0.5, normalize=False)[0]
        return out.transpose(1, 2)

    version = getattr(importlib.import_module("fla"), "__version__", "of unknown version")
    return run, f"fla {version}"


def versions(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """By name, the baseline first if its weights fit."""
    b, h, t, d = q.shape
    forms: dict[str, Callable[..., Tensor]] = {}
    if 4 * b * h * t * t <= _MOST_PAIRS:
        forms["quadratic"] = quadratic
        forms["quadratic, inductor"] = torch.compile(quadratic, dynamic=False)
        forms["quadratic, effopt"] = torch.compile(quadratic, backend="effopt", dynamic=False)
    if 4 * b * h * t * d * v.shape[-1] <= _MOST_STATES:
        forms["cumulative"] = cumulative
    op, target = ops.linear_attention, target_of(q.device)
    settings: dict[str, Any] = {"scale": d**-0.5}
    operands = op.bind((q, k, v), settings)
    for lowering in build_registry().lowerings[op.name]:
        if lowering.name != "reference" and lowering.supports(target, operands) is None:
            run = lowering.run
            forms[lowering.name] = lambda q, k, v, run=run: run(q, k, v, **settings)[0]
    fla, _ = fla_or_why(q.device)
    if fla is not None:
        forms["fla"] = fla
    return {name: lambda form=form: form(q, k, v) for name, form in forms.items()}


def measure(
    t: int, d: int, device: torch.device, dtype: torch.dtype, rounds: int, most: tuple[float, float]
) -> list[dict[str, Any]]:
    """All forms of one shape, in turn."""
    q, k, v = (torch.randn(1, HEADS, t, d, device=device, dtype=dtype) for _ in range(3))
    calls = versions(q, k, v)
    if t <= 4096:
        wide = (x.double() for x in (q, k, v))
        wanted, _ = ops.linear_attention.reference(*wide, scale=d**-0.5)
        largest = float(wanted.abs().max())
        tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * largest
        for call in calls.values():
            torch.testing.assert_close(call().double(), wanted, rtol=0.0, atol=tolerance)
    times = medians(calls, device, rounds)
    base = times.get("quadratic")
    rows = []
    for name, seconds in times.items():
        flops = 4.0 * HEADS * t * d * d
        reached = flops / seconds, 4.0 * q.nbytes / seconds
        rows.append(
            {
                "t": t,
                "d": d,
                "version": name,
                "milliseconds": 1e3 * seconds,
                "ratio": None if base is None else base / seconds,
                "gflops": flops / 1e9,
                "gflops_per_s": reached[0] / 1e9,
                "gbytes_per_s": reached[1] / 1e9,
                "of_ceiling": max(reached[0] / most[0], reached[1] / most[1]),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = "| t | d | version | ms | times as fast as quadratic | GFLOP | GFLOP/s | GB/s | of ceiling |\n"
    head += "|--:|--:|---|--:|--:|--:|--:|--:|--:|\n"
    return head + "\n".join(
        f"| {r['t']} | {r['d']} | {r['version']} | {r['milliseconds']:.2f} |"
        f" {'-' if r['ratio'] is None else format(r['ratio'], '.2f')} | {r['gflops']:.2f} |"
        f" {r['gflops_per_s']:.1f} | {r['gbytes_per_s']:.1f} | {r['of_ceiling']:.2f} |"
        for r in rows
    )
