"""Whether two regions over the same inputs compute the same, decided on sampled values.

The measure is a float64 evaluation of the first. The second may be as far from it as the dtype table
allows, or as the first's own rounding explains; NaN and infinities must be where the first has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph.region import Region, dropout_of, evaluate, is_random, raise_values
from effopt.graph.sampling import Draw
from effopt.graph.tolerances import GRADIENT_FACTOR, tolerance_of

_SLACK = 4.0  # how often the original's own rounding error may be exceeded
_ILL_CONDITIONED = 0.05  # an error of the original beyond this is no measure of another's


class Unchecked(Exception):  # noqa: N818 - a value that travels by `raise`, not an error
    """Why a rewrite could not be checked."""


@dataclass(frozen=True)
class Wrong:
    """A difference that was found."""

    draw: str
    detail: str


@dataclass(frozen=True)
class Expected:
    """What the original gives: in its own dtypes, and in float64 (None where that is not possible)."""

    own: tuple[Any, ...]
    exact: tuple[Any, ...] | None


def expected_of(before: Region, filled: Sequence[Any]) -> Expected:
    """Both evaluations of the original. Raises Unchecked if it does not run on sampled inputs."""
    try:
        with torch.no_grad():
            own = evaluate(before, filled)
    except Exception as error:
        raise Unchecked(f"the original does not run on sampled inputs: {first_line(error)}") from error
    try:
        with torch.no_grad():
            exact = evaluate(before, raise_values(list(filled)), raised=True)
    except Exception:  # noqa: BLE001 - an op without float64; its own dtype is then the reference
        return Expected(own, None)
    return Expected(own, exact)


def compare_on(
    after: Region, expected: Expected, filled: Sequence[Any], draw: Draw, rtol: float | None
) -> Wrong | None:
    """Run the replacement on one draw and compare. Raises nothing: an error is a difference."""
    try:
        with torch.no_grad():
            got = evaluate(after, filled)
    except Exception as error:  # noqa: BLE001 - a replacement that does not run is wrong
        return Wrong(draw.name, f"the replacement raises {first_line(error)}")
    dtypes = [v.dtype for v in filled if isinstance(v, Tensor)]
    for index, value in enumerate(got):
        own = expected.own[index]
        exact = expected.exact[index] if expected.exact is not None else own
        for a, o, e in zip(tensors_in(value), tensors_in(own), tensors_in(exact), strict=True):
            tolerance = rtol if rtol is not None else tolerance_of(a.dtype, *_floating(dtypes)).rtol
            # The original's rounding of masked rows is no measure: its least number absorbs the scores.
            most = _ILL_CONDITIONED if draw.mask == "none" else 4 * tolerance
            problem = difference(a, o, e, tolerance, most)
            if problem:
                return Wrong(draw.name, f"result {index}: {problem}" if len(got) > 1 else problem)
    return None


def difference(got: Tensor, own: Tensor, exact: Tensor, tolerance: float, most: float) -> str:
    """How `got` differs from the original; empty if it does not.

    Args:
        got: of the replacement.
        own: of the original, in its own dtypes.
        exact: of the original, in float64.
        tolerance: allowed relative to the largest exact magnitude.
        most: bound on what the original's own error may add to that.
    """
    if got.shape != own.shape or got.dtype != own.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {own.dtype} {list(own.shape)}"
    if not (got.is_floating_point() or got.is_complex()):
        return "" if torch.equal(got, own) else f"{int((got != own).sum())} of {got.numel()} elements differ"
    # Where the original overflows and the exact value does not, there is nothing to hold on to.
    meant = own.isfinite() == exact.isfinite()
    same_kind = (got.isnan() == own.isnan()) & (got.isinf() == own.isinf())
    same_kind &= ~own.isinf() | (got == own)
    if not bool((same_kind | ~meant).all()):
        count = int((~same_kind & meant).sum())
        return f"{count} of {got.numel()} elements are NaN or infinite in one and not in the other"
    finite = own.isfinite() & exact.isfinite() & got.isfinite()
    if not bool(finite.any()):
        return ""
    wide = torch.complex128 if got.is_complex() else torch.float64
    g, o, e = (x.to(wide)[finite] for x in (got, own, exact))
    scale = float(e.abs().max()) or 1.0
    allowed = max(tolerance, min(_SLACK * float((o - e).abs().max()) / scale, most))
    apart = torch.minimum((g - e).abs(), (g - o).abs()).max()
    error = float(apart) / scale
    return f"relative error {error:.2g}; allowed is {allowed:.2g}" if error > allowed else ""


def compare_gradients(
    before: Region, after: Region, filled: Sequence[Any], wanted: frozenset[Node], rtol: float | None
) -> Wrong | None:
    """Compare derivatives with respect to the floating inputs in `wanted`, for one random cotangent."""
    try:
        own = _gradients(before, filled, wanted, raised=False)
        exact = _gradients(before, raise_values(list(filled)), wanted, raised=True)
    except Exception as error:
        raise Unchecked(f"the original has no derivative on sampled inputs: {first_line(error)}") from error
    try:
        got = _gradients(after, filled, wanted, raised=False)
    except Exception as error:  # noqa: BLE001 - a replacement without a derivative is wrong in training
        return Wrong("gradients", f"the backward of the replacement raises {first_line(error)}")
    dtypes = _floating([v.dtype for v in filled if isinstance(v, Tensor)])
    tolerance = GRADIENT_FACTOR * (rtol if rtol is not None else tolerance_of(*dtypes).rtol)
    for node in got:
        problem = difference(got[node], own[node], exact[node], tolerance, _ILL_CONDITIONED)
        if problem:
            return Wrong("gradients", f"with respect to {node.name}: {problem}")
    return None


def _gradients(
    region: Region, filled: Sequence[Any], wanted: frozenset[Node], raised: bool
) -> dict[Node, Tensor]:
    leaves, inputs = {}, []
    for node, value in zip(region.inputs, filled, strict=True):
        if node in wanted and isinstance(value, Tensor) and value.is_floating_point():
            value = leaves[node] = value.detach().requires_grad_()
        inputs.append(value)
    with torch.enable_grad():
        outputs = [
            t
            for out in evaluate(region, inputs, raised=raised)
            for t in tensors_in(out)
            if t.is_floating_point()
        ]
        total: Any = 0.0
        for index, out in enumerate(outputs):
            generator = torch.Generator().manual_seed(index)
            cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
            total = total + (out.double() * cotangent).sum()
        if not isinstance(total, Tensor) or not total.requires_grad:
            return {node: torch.zeros_like(leaf) for node, leaf in leaves.items()}
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return {n: z if g is None else g for n, g, z in zip(leaves, found, zeros, strict=True)}


def gradients_of(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of `leaves`, each element of `results` with a weight of its own; zeros where none arrives."""
    total: Any = 0.0
    for result in results:
        weight = torch.linspace(-1, 1, result.numel(), dtype=torch.float64, device=result.device)
        total = total + (result.double() * weight.view(result.shape)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, found, strict=True)]


def other_dropout(before: Region, after: Region) -> Wrong | None:
    """Dropout is switched off in checks, so what it would do must be the same by declaration."""
    for node in (*before.nodes, *after.nodes):
        if is_random(node) and not dropout_of(node):
            raise Unchecked(f"it draws random numbers ({node.target})")
    was, now = (sorted(p for n in r.nodes if (p := dropout_of(n))) for r in (before, after))
    return None if was == now else Wrong("dropout", f"its probabilities were {was} and would be {now}")


def _floating(dtypes: Sequence[torch.dtype]) -> list[torch.dtype]:
    return [d for d in dtypes if d.is_floating_point or d.is_complex]


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
