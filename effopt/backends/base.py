"""What a lowering is, and how one is chosen for each canonical op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Choice:
    """The lowering taken for one node, and for each one not taken the reason."""

    lowering: Lowering
    refused: tuple[tuple[str, str], ...]


def choose(
    lowerings: Sequence[Lowering], target: Target, operands: Operands, result: Any, training: bool
) -> Choice:
    """The cheapest lowering that supports these operands.

    Args:
        lowerings: candidates for one op. The last one must accept everything (the reference).
        target: what the code runs on.
        operands: schema argument name -> fake value.
        result: fake result of the op.
        training: whether a backward pass will be taken through the op.
    """
    able, refused = [], []
    for lowering in lowerings:
        if training and not lowering.differentiable:
            reason: str | None = "has no backward, and the graph is traced for training"
        else:
            reason = lowering.supports(target, operands)
        if reason is None:
            able.append((lowering.cost(target, operands, result), lowering))
        else:
            refused.append((lowering.name, reason))
    cost, best = min(able, key=lambda entry: entry[0])
    for other_cost, other in able:
        if other is not best:
            refused.append(
                (other.name, f"predicted {other_cost * 1e6:.1f} us, {best.name} {cost * 1e6:.1f} us")
            )
    return Choice(best, tuple(refused))
