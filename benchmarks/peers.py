"""What attention is compared with on a GPU: each kernel of SDPA by itself, the library's flash kernel with a
window, FlexAttention, and every lowering of effopt. A version that does not run, or is wrong, says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from effopt.graph.ops.base import Op
from effopt.plugins.manager import build_registry
from effopt.target import target_of

Calls = dict[str, Callable[..., Tensor]]
"""Versions by name, each a function of query, key and value."""
BACKENDS = {
    "sdpa, flash": SDPBackend.FLASH_ATTENTION,
    "sdpa, cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa, math": SDPBackend.MATH,
}
NATIVE = (*BACKENDS, "flash, window")
"""Kernels of the library: the fastest of these is the one to beat."""
MOST_MATH_BYTES = 2.0**33
"""Scores of float32 above which `math`, which makes them all, is left out."""


def sdpa_versions(scores: int, **given: Any) -> Calls:
    """Every kernel of `scaled_dot_product_attention` on its own; `scores`: how many the call has."""

    def by(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **given)

        return run

    found = {name: by(backend) for name, backend in BACKENDS.items()}
    if 4.0 * scores > MOST_MATH_BYTES:
        del found["sdpa, math"]
    return found


def flash_window(width: int, scale: float) -> Callable[..., Tensor]:
    """The library's flash kernel, which has windows that SDPA does not give to it."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[2]
        given = (*(x.transpose(1, 2) for x in (q, k, v)), None, None, t, t, 0.0, True, False)
        sides = {"scale": scale, "window_size_left": width - 1, "window_size_right": 0}
        out: Tensor = torch.ops.aten._flash_attention_forward(*given, **sides)[0]
        return out.transpose(1, 2)

    return run


def once(make: Callable[[], Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """What `make` gives, made at the first call, where `that_run` tells of it if it fails."""
    made = functools.cache(make)
    return lambda *x: made()(*x)


def flex(is_open: Any, t: int, s: int, device: torch.device, **given: Any) -> Callable[..., Tensor]:
    """FlexAttention, compiled, with a block mask ready made; without a mask if `is_open` is None."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # past the eighth compilation of a function the library runs it uncompiled
    blocks = None if is_open is None else create_block_mask(is_open, None, None, t, s, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, **given)


def lowerings(op: Op, operands: tuple[Tensor, ...], training: bool, **given: Any) -> Calls:
    """Every lowering that takes the call on this device, but the reference."""
    target, bound = target_of(operands[0].device), op.bind(operands, given)
    return {
        f"effopt, {low.name}": lambda *x, run=low.run: run(*x, **given)
        for low in build_registry().lowerings[op.name]
        if low.name != "reference" and low.supports(target, bound) is None
        if low.differentiable or not training
    }


def that_run(
    calls: Mapping[str, Callable[[], Any]], wanted: Any, tolerance: float
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The versions that run and agree; and why the others do not.

    Args:
        calls: without arguments, each giving a tensor or a tuple of them.
        wanted: what they give; None takes the first that runs for it.
        tolerance: greatest difference, relative to the greatest value.
    """
    taken, refused = {}, {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA says in a warning each why a kernel was not taken
                got = call()
            wanted = wanted if wanted is not None else got
            worst = max(map(_error, _tuple(got), _tuple(wanted)))
        except Exception as error:  # noqa: BLE001 - a peer that fails must not end the run, and is told of
            refused[name] = f"{type(error).__name__}: {str(error).strip()[:120].partition(chr(10))[0]}"
            continue
        if worst <= tolerance:
            taken[name] = call
        else:
            refused[name] = f"WRONG: differs by {worst:.2g} of the largest value"
    return taken, refused


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _error(got: Tensor, wanted: Tensor) -> float:
    largest = float(wanted.abs().max().clamp(min=1e-30))
    worst = float((got.float() - wanted.float()).abs().max())
    return worst / largest if worst == worst else float("inf")
