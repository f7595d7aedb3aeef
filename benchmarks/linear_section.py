"""Times of causal linear attention in its forms: a section of benchmarks/attention.py.

Versions: `quadratic`, `tril(q k^T) v` as models write it, the baseline; `quadratic, inductor`, the same
compiled by Inductor; `quadratic, effopt`, the same compiled by effopt; `cumulative`, the states of all tokens
by `cumsum`, left out where they take more than 1 GiB; every lowering of `linear_attention` that this device
has but the reference; and `fla`, where flash-linear-attention is installed and the device is a GPU. Each is
compared with the op's reference first, up to 4,096 tokens. FLOPs are those of tokens one by one, the fewest:
4 d dv a token and head (12 with gradients), so that a quadratic form shows what its pairs cost. Bytes are
query, key, value and result, each once.

On a GPU also with a decay of each head, token and channel, with gradients, and for eight sequences, against
`fla`'s kernels for the same; operands lie as models have them, `[b, t, h, d]`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from itertools import product
from typing import Any

import peers
import torch
from timing import medians
from torch import Tensor

from effopt.graph import ops

SECTION = "<!-- written by benchmarks/attention.py --section linear -->"
SIZES = {"cpu": (1024, 2048, 4096), "cuda": (2048, 8192, 32768)}
HEAD_SIZES = (64, 128)
HEADS = 8
BATCHES = {"cpu": (1,), "cuda": (1, 8)}
DECAYS = {"cpu": ("",), "cuda": ("", "head", "token", "channel")}
"""What decays differently; nothing at all first."""
_MOST_STATES, _MOST_PAIRS = 2**30, 2**33
"""Bytes of float32 states, and of float32 weights, above which a form is left out."""


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5
    return torch.matmul(torch.matmul(q * scale, k.transpose(-2, -1)).tril(), v)


def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return torch.matmul((q * q.shape[-1] ** -0.5).unsqueeze(-2), states).squeeze(-2)


def fla_or_why(device: torch.device, decays: str = "") -> tuple[Callable[..., Tensor] | None, str]:
    """flash-linear-attention's chunked form for what decays, or why it is not timed."""
    if importlib.util.find_spec("fla") is None:
        return None, "fla: not timed, flash-linear-attention is not installed"
    if device.type != "cuda":
        return None, "fla: not timed, its kernels run on a GPU"
    name = {"": "linear_attn", "channel": "gla"}.get(decays, "simple_gla")
    chunked = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
        # It wants `[b, t, h, d]`, which is how the operands lie.
        b, h, t, d = q.shape
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        given: dict[str, Any] = {"scale": d**-0.5}
        if decay is None:
            given["normalize"] = False
        else:
            wide = decay.view(1, h, 1).expand(b, h, t) if decay.dim() == 1 else decay
            given["g"] = wide.transpose(1, 2)
        out: Tensor = chunked(q, k, v, **given)[0]
        return out.transpose(1, 2)

    version = getattr(importlib.import_module("fla"), "__version__", "of unknown version")
    return run, f"fla {version}"


Forms = dict[str, Callable[..., Tensor]]
"""By name, each a function of query, key, value and decay."""


def versions(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, decays: str, training: bool) -> Forms:
    """The baseline first if its weights fit."""
    b, h, t, d = q.shape
    forms: Forms = {}
    alone = decay is None and not training
    if alone and 4 * b * h * t * t <= _MOST_PAIRS:
        written = {"quadratic": quadratic}
        written["quadratic, inductor"] = torch.compile(quadratic, dynamic=False)
        written["quadratic, effopt"] = torch.compile(quadratic, backend="effopt", dynamic=False)
        forms |= {name: lambda q, k, v, _, form=form: form(q, k, v) for name, form in written.items()}
    if alone and 4 * b * h * t * d * v.shape[-1] <= _MOST_STATES:
        forms["cumulative"] = lambda q, k, v, _: cumulative(q, k, v)
    settings: dict[str, Any] = {"scale": d**-0.5}
    found = peers.lowerings(ops.linear_attention, (q, k, v), training, decay=decay, **settings)
    for name in found:
        forms[name.removeprefix("effopt, ")] = lambda q, k, v, g, run=found[name]: run(q, k, v)[0]
    fla, _ = fla_or_why(q.device, decays)
    if fla is not None:
        forms["fla"] = fla
    return forms


def measure(
    t: int, d: int, device: torch.device, dtype: torch.dtype, rounds: int, most: tuple[float, float]
) -> list[dict[str, Any]]:
    """All forms, decays, batches and passes of one shape."""
    passes = (False, True) if device.type == "cuda" else (False,)
    turns = product(DECAYS[device.type], BATCHES[device.type], passes)
    return [
        row
        for decays, b, training in turns
        for row in _measure(t, d, b, decays, training, device, dtype, rounds, most)
    ]


def made_up_decay(decays: str, b: int, t: int, d: int, device: torch.device) -> Tensor | None:
    """Logarithms of decay, float32, as `[b, t, h, ..]` seen as `[b, h, t, ..]`."""
    if not decays:
        return None
    shape = {"head": (HEADS,), "token": (b, t, HEADS), "channel": (b, t, HEADS, d)}[decays]
    drawn = -0.1 * torch.rand(shape, device=device)
    return drawn if decays == "head" else drawn.transpose(1, 2)


def _measure(
    t: int,
    d: int,
    b: int,
    decays: str,
    training: bool,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    most: tuple[float, float],
) -> list[dict[str, Any]]:
    made = [torch.randn(b, t, HEADS, d, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)]
    if device.type == "cpu":
        made = [x.contiguous() for x in made]
    (q, k, v, upstream), decay = made, made_up_decay(decays, b, t, d, device)
    forms = versions(q, k, v, decay, decays, training)
    wanted, tolerance = None, 1e-5 if dtype == torch.float32 else 2e-2
    if t <= 4096 and not training:
        wide = (x.double() for x in (q, k, v))
        far = None if decay is None else decay.double()
        wanted = ops.linear_attention.reference(*wide, scale=d**-0.5, decay=far)[0]
    calls: dict[str, Callable[[], Any]] = {n: lambda f=f: f(q, k, v, decay) for n, f in forms.items()}
    if training:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        calls = {
            name: lambda form=form: torch.autograd.grad(form(*leaves, decay), leaves, upstream)
            for name, form in forms.items()
        }
    with torch.set_grad_enabled(training):
        calls, refused = peers.that_run(calls, wanted, tolerance)
        times = medians(calls, device, rounds)
    what = f"{f', decay of a {decays}' if decays else ''}{', with gradients' if training else ''}"
    of = {"b": b, "t": t, "d": d} if device.type == "cuda" else {"t": t, "d": d}
    rows: list[dict[str, Any]] = [{**of, "version": n + what, "why_not": why} for n, why in refused.items()]
    base = times.get("quadratic", times.get("fla"))
    for name, seconds in times.items():
        flops = (3.0 if training else 1.0) * 4.0 * b * HEADS * t * d * d
        reached = flops / seconds, (2.0 if training else 1.0) * 4.0 * q.nbytes / seconds
        rows.append(
            {
                **of,
                "version": name + what,
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
    return head + "\n".join(_line(r) for r in rows)


def _line(r: dict[str, Any]) -> str:
    version = f"{r['version']}, {r['b']} sequences" if r.get("b", 1) > 1 else r["version"]
    text = f"| {r['t']} | {r['d']} | {version} |"
    if "why_not" in r:
        return f"{text} {r['why_not']} | | | | | |"
    ratio = "-" if r["ratio"] is None else format(r["ratio"], ".2f")
    return (
        f"{text} {r['milliseconds']:.2f} | {ratio} | {r['gflops']:.2f} | {r['gflops_per_s']:.1f} |"
        f" {r['gbytes_per_s']:.1f} | {r['of_ceiling']:.2f} |"
    )
