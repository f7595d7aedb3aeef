"""A lowering against the reference of its op, on the op's own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.graph.equivalence import difference, gradients_of, tensors_in
from effopt.graph.ops.base import Sample
from effopt.graph.region import raise_values
from effopt.graph.tolerances import GRADIENT_FACTOR, tolerance_of
from effopt.target import target_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class LoweringCheck:
    """What `check_lowering` tried."""

    compared: int = 0
    gradients: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Reason -> samples that the lowering does not support."""
    problems: list[str] = field(default_factory=list)


def check_lowering(
    lowering: Lowering, *, device: str = "cpu", dtypes: Sequence[torch.dtype] = DTYPES
) -> LoweringCheck:
    """Compare a lowering with its op's reference in float64.

    Values within the dtype table for every sample that it supports, contiguous and with other strides;
    shape and dtype as the op's; gradients if it is differentiable.

    Args:
        lowering: what to test.
        device: where; a lowering that does not run there refuses, with its reason in the result.
        dtypes: floating dtypes of the samples.

    Raises:
        AssertionError: lists everything that failed.
    """
    target, done = target_of(torch.device(device)), LoweringCheck()
    for dtype in dtypes:
        for index, sample in enumerate(lowering.op.samples(dtype, torch.device(device))):
            for strides in ("contiguous", "strided"):
                args, kwargs = _arranged(sample, strides)
                reason = lowering.supports(target, lowering.op.bind(args, kwargs))
                if reason is not None:
                    done.refused[reason] = done.refused.get(reason, 0) + 1
                    continue
                at = f"sample {index}, {str(dtype).removeprefix('torch.')}, {strides}"
                done.compared += 1
                done.problems.extend(f"{at}: {p}" for p in _value_problems(lowering, args, kwargs, dtype))
                if lowering.differentiable:
                    done.gradients += 1
                    done.problems.extend(
                        f"{at}: {p}" for p in _gradient_problems(lowering, args, kwargs, dtype)
                    )
    assert not done.problems, f"{lowering.op.name}/{lowering.name}:\n  " + "\n  ".join(done.problems)
    return done


def _arranged(sample: Sample, strides: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def arrange(value: Any) -> Any:
        if strides == "contiguous" or not isinstance(value, Tensor) or value.dim() < 2:
            return value
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)

    return tuple(arrange(a) for a in sample.args), {k: arrange(v) for k, v in sample.kwargs.items()}


def _value_problems(
    lowering: Lowering, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
) -> list[str]:
    reference = lowering.op.reference
    with torch.no_grad():
        got = tensors_in(lowering.run(*args, **kwargs))
        own = tensors_in(reference(*args, **kwargs))
        exact = tensors_in(reference(*raise_values(list(args)), **_raised(kwargs)))
    tolerance = tolerance_of(dtype).rtol
    triples = zip(got, own, exact, strict=True)
    found = [difference(g, o, e, tolerance, 4 * tolerance) for g, o, e in triples]
    return [f"result {i}: {problem}" for i, problem in enumerate(found) if problem]


def _raised(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: raise_values(v) for k, v in kwargs.items()}


def _gradient_problems(
    lowering: Lowering, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype
) -> list[str]:
    reference = lowering.op.reference
    got = _gradients(lowering.run, args, kwargs)
    own = _gradients(reference, args, kwargs)
    exact = _gradients(reference, tuple(raise_values(list(args))), _raised(kwargs))
    tolerance = GRADIENT_FACTOR * tolerance_of(dtype).rtol
    problems = []
    for index, (g, o, e) in enumerate(zip(got, own, exact, strict=True)):
        problem = difference(g, o, e, tolerance, 4 * tolerance)
        if problem:
            problems.append(f"gradient {index}: {problem}")
    return problems


def _gradients(call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]
        return value

    made, named = [leaf(a) for a in args], {k: leaf(v) for k, v in kwargs.items()}
    results = [r for r in tensors_in(call(*made, **named)) if r.requires_grad]
    if not results:
        return [torch.zeros_like(v) for v in leaves]
    return gradients_of(results, leaves)
