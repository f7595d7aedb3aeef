"""Calls of an op in some dtype, the same in float64, and the comparison of the two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.graph.ops import Sample
from effopt.graph.tolerances import TOLERANCES
from effopt.target import Target

H100 = Target("cuda", "sm_90", 4.3e12, 7.9e14)
"""What choices and refusals are asked for: no GPU is needed to predict for one."""


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def double(value: Any) -> Any:
    """A float64 copy with the same strides of a tensor that has values; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(torch.float64).requires_grad_(value.requires_grad)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """`actual` is within `factor` times the table of the float64 `expected`."""
    allowed = TOLERANCES[dtype]
    assert actual.dtype == dtype
    bounds = {"rtol": factor * allowed.rtol, "atol": factor * allowed.atol}
    torch.testing.assert_close(actual.detach().double(), expected.detach(), equal_nan=True, **bounds)


def assert_values(lowering: Lowering, sample: Sample) -> None:
    """Values agree with the reference in float64; shape and strides with the reference in the same dtype."""
    actual = outputs(lowering.call(*sample.args, **sample.kwargs))
    same_dtype = outputs(lowering.op.reference(*sample.args, **sample.kwargs))
    exact = outputs(lowering.op.reference(*map(double, sample.args), **sample.kwargs))
    for result, like, expected in zip(actual, same_dtype, exact, strict=True):
        assert result.shape == like.shape
        assert result.stride() == like.stride()
        assert_near(result, expected, like.dtype)


def gradients(call: Any, args: Iterable[Any], kwargs: Any, upstream: Iterable[Tensor | None]) -> list[Any]:
    """Gradients of the arguments that want one, for given gradients of the outputs (None: unused)."""
    args = list(args)
    wanting = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    pairs = [(o, g) for o, g in zip(outputs(call(*args, **kwargs)), upstream, strict=True) if g is not None]
    return list(torch.autograd.grad([o for o, _ in pairs], wanting, [g for _, g in pairs], allow_unused=True))


def assert_gradients(
    lowering: Lowering, sample: Sample, unused: tuple[int, ...] = (), factor: float = 1.0
) -> None:
    """Gradients agree with autograd of the reference in float64; outputs in `unused` give none."""
    shapes = outputs(lowering.op.reference(*sample.args, **sample.kwargs))
    upstream = [None if i in unused else torch.randn_like(o.detach()) for i, o in enumerate(shapes)]
    actual = gradients(lowering.call, sample.args, sample.kwargs, upstream)
    exact_args, exact_upstream = map(double, sample.args), map(double, upstream)
    expected = gradients(lowering.op.reference, exact_args, sample.kwargs, exact_upstream)
    assert len(actual) > 0
    for got, wanted in zip(actual, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert_near(got, wanted, got.dtype, factor)


def wanting_gradients(sample: Sample) -> Sample:
    """The call with gradients wanted of all its tensors."""
    args = (a.requires_grad_() if isinstance(a, Tensor) else a for a in sample.args)
    return Sample(tuple(args), sample.kwargs)
