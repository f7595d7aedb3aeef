"""What a lowering is, and how one is chosen for each canonical op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from effopt.graph.ops.base import Op, Operands
from effopt.target import Target


@dataclass(frozen=True)
class Lowering:
    """One way to run a canonical op. Knows tensors and targets, never FX."""

    op: Op
    name: str
    """Short and unique among the lowerings of one op: `triton`, `sdpa`, `reference`."""
    call: Callable[..., Any]
    """Same arguments and result as the op; traced into the graph that the backend compiles."""
    supports: Callable[[Target, Operands], str | None]
    """None if it can run, else the reason why not, in words a user can act on."""
    cost: Callable[[Target, Operands, Any], float]
    """Predicted seconds for (target, operands, result); only the order matters."""
    differentiable: bool = True
    """Whether autograd goes through `call`. Those without a backward are left out of training."""
    prepack: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict, hash=False)
    """Operand name -> the layout that `call` wants of it: a module-level function, pure, of that operand.

    Such an operand must be a constant of the graph. It is laid out once, for all graphs of a model and all
    lowerings that name the same function; the op's own layout is not kept where no one else reads it.
    """

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """`call` on operands in the op's own layout: those in `prepack` are laid out at every call."""
        bound = self.op.bind(args, kwargs)
        return self.call(**bound | {n: lay_out(bound[n]) for n, lay_out in self.prepack.items()})


def by_operands(op: Op) -> Callable[[Callable[[Operands], Any]], Callable[..., Any]]:
    """Make a function of operands by name one with the arguments of `op`, as `Lowering.call` wants it.

    So the signature of an op with many options stands in the op alone. Dynamo can trace the calls.
    """
    arguments = op.overload._schema.arguments
    names = tuple(a.name for a in arguments)
    absent = {a.name: a.default_value for a in arguments if a.has_default_value()}

    def give_arguments(run: Callable[[Operands], Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            operands = {**absent, **dict(zip(names, args, strict=False)), **kwargs}
            if len(operands) != len(names) or len(args) > len(names):
                raise TypeError(f"{run.__name__}: expected {', '.join(names)}, got {', '.join(operands)}")
            return run(operands)

        return call

    return give_arguments


def inductor_settings(**settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Say of a kernel what Inductor is to be set to in each graph that calls it, whatever the user set."""

    def mark(call: Callable[..., Any]) -> Callable[..., Any]:
        call.inductor_settings = settings  # type: ignore[attr-defined]
        return call

    return mark


@dataclass(frozen=True)
class Choice:
    """The lowering taken for one node, and for each one not taken the reason."""

    lowering: Lowering
    refused: tuple[tuple[str, str], ...]


NEAR = 4.0
"""Predictions within this factor of the least may be wrong about which is the fastest: those are measured."""
Measure = Callable[[Sequence[Lowering]], Mapping[str, float | str] | str]
"""Lowerings -> seconds of each by name, or why that one has none; or why none of them was measured."""


def choose(
    lowerings: Sequence[Lowering],
    target: Target,
    operands: Operands,
    result: Any,
    training: bool,
    constants: Container[str] = (),
    measure: Measure | None = None,
) -> Choice:
    """The cheapest lowering that supports these operands.

    Args:
        lowerings: candidates for one op. The last one must accept everything (the reference).
        target: what the code runs on.
        operands: schema argument name -> fake value.
        result: fake result of the op.
        training: whether a backward pass will be taken through the op.
        constants: names of the operands that a lowering may have in its own layout.
        measure: asked where more than one prediction is near the least; without it the least is taken.
    """
    able, refused = [], []
    for lowering in lowerings:
        if training and not lowering.differentiable:
            reason: str | None = "has no backward, and the graph is traced for training"
        elif any(name not in constants for name in lowering.prepack):
            wanted = ", ".join(name for name in lowering.prepack if name not in constants)
            reason = f"wants {wanted} in a layout of its own, made once, and it is no constant of the graph"
        else:
            reason = lowering.supports(target, operands)
        if reason is None:
            able.append((lowering.cost(target, operands, result), lowering))
        else:
            refused.append((lowering.name, reason))
    least = min(cost for cost, _ in able)
    near = [lowering for cost, lowering in able if cost <= NEAR * least]
    found = measure(near) if measure is not None and len(near) > 1 else {}
    times = {} if isinstance(found, str) else {k: t for k, t in found.items() if not isinstance(t, str)}
    if times:
        best = min((low for low in near if low.name in times), key=lambda low: times[low.name])
    else:
        best = min(able, key=lambda entry: entry[0])[1]
    costs = [(cost, other) for cost, other in able if other is not best]
    predicted = next(cost for cost, lowering in able if lowering is best)
    for cost, other in costs:
        words = f"predicted {cost * 1e6:.1f} us, {best.name} {predicted * 1e6:.1f} us"
        refused.append((other.name, _measured(other, best, found, times) or words))
    return Choice(best, tuple(refused))


def _measured(
    other: Lowering, best: Lowering, found: Mapping[str, float | str] | str, times: Mapping[str, float]
) -> str | None:
    """Why `other` was not taken, as far as measuring says."""
    if other.name in times:
        return f"measured {times[other.name] * 1e6:.1f} us, {best.name} {times[best.name] * 1e6:.1f} us"
    if isinstance(found, str):
        return f"predicted to take longer than {best.name}, and not measured: {found}"
    if other.name in found:
        return f"could not be measured: {found[other.name]}"
    return f"predicted to take over {NEAR:g} times the least, and so not measured" if times else None
