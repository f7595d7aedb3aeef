"""Calls of attention with gradients wanted, and how theirs are compared with the reference's in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from effopt.backends.triton.flash_attention import FLASH_ATTENTION
from effopt.graph import ops
from effopt.graph.equivalence import difference
from effopt.graph.tolerances import GRADIENT_FACTOR, tolerance_of
from tests.backends.triton.calls import double

LEARNED = ("bias", "sinks")
"""Operands by keyword that may want a gradient."""
VANISHES = 1e-9
"""An exact gradient below this is 0 but for the rounding of float64: there is no scale to be relative to."""


def attention_gradients(
    call: Callable[..., Tensor], args: tuple[Tensor, ...], kwargs: Mapping[str, Any], upstream: Tensor
) -> dict[str, Tensor]:
    """Of query, key, value, and of a bias and sinks where they are given."""
    leaves = dict(zip(("query", "key", "value"), args, strict=True))
    leaves |= {n: kwargs[n] for n in LEARNED if n in kwargs}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    out = call(**{**kwargs, **leaves})
    found = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))
    return dict(zip(leaves, found, strict=True))


def in_float64(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: double(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def assert_attention_gradients(
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Any],
    reference: Callable[..., Tensor] = ops.attention.reference,
    upstream: Tensor | None = None,
) -> None:
    """Gradients of the lowering as those of the reference; NaN where those are."""
    query, _, value = args
    shape = (*query.shape[:-1], value.shape[-1])
    upstream = torch.randn(shape, device=query.device) if upstream is None else upstream
    got = attention_gradients(FLASH_ATTENTION.call, args, kwargs, upstream)
    own = attention_gradients(reference, args, kwargs, upstream)
    exact = attention_gradients(reference, tuple(map(double, args)), in_float64(kwargs), upstream)
    dtype = query.dtype
    tolerance = tolerance_of(dtype).rtol * (1.0 if dtype == torch.float32 else GRADIENT_FACTOR)
    for name, gradient in got.items():
        assert gradient.shape == own[name].shape
        finite = exact[name][exact[name].isfinite()]
        if finite.numel() and float(finite.abs().max()) < VANISHES:
            assert float(gradient.nan_to_num().abs().max()) < 100 * tolerance, name
            continue
        problem = difference(gradient, own[name], exact[name], tolerance, 4 * tolerance)
        assert not problem, f"{name}: {problem}"
