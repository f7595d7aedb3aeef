"""Two functions that must compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from effopt.graph.equivalence import difference, gradients_of, tensors_in
from effopt.graph.tolerances import GRADIENT_FACTOR, tolerance_of


def assert_equivalent(
    expected: Callable[..., Any],
    actual: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    gradients: bool = True,
    rtol: float | None = None,
) -> None:
    """Compare values, and gradients where an input asks for one.

    Args:
        expected: the original.
        actual: what must agree with it. Each gets inputs of its own, so either may write into them.
        inputs: tensors and anything else.
        gradients: whether to compare those of inputs that require one.
        rtol: relative to the largest magnitude of a result, instead of the dtype's; say why where you set it.

    Raises:
        AssertionError: names the result or the input, the error and what is allowed.
    """
    dtypes = [i.dtype for i in inputs if isinstance(i, Tensor)]
    allowed = rtol if rtol is not None else tolerance_of(*dtypes).rtol
    was, was_grads = _run(expected, inputs, gradients)
    now, now_grads = _run(actual, inputs, gradients)
    assert len(was) == len(now), f"{len(now)} results instead of {len(was)}"
    for index, (a, b) in enumerate(zip(now, was, strict=True)):
        problem = difference(a, b, b, allowed, allowed)
        assert not problem, f"result {index}: {problem}"
    for index, (a, b) in enumerate(zip(now_grads, was_grads, strict=True)):
        problem = difference(a, b, b, GRADIENT_FACTOR * allowed, GRADIENT_FACTOR * allowed)
        assert not problem, f"gradient of input {index}: {problem}"


def _run(
    function: Callable[..., Any], inputs: Sequence[Any], gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
    own = [
        i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else copy.copy(i)
        for i in inputs
    ]
    leaves = [i for i in own if isinstance(i, Tensor) and i.requires_grad]
    results = tensors_in(function(*own))
    reached = [r for r in results if r.requires_grad]
    if not (gradients and leaves and reached):
        return [r.detach() for r in results], []
    return [r.detach() for r in results], gradients_of(reached, leaves)
