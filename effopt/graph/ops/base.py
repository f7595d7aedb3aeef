"""What a canonical op is: a reference function, a shape rule, a cost, and samples.

The reference is the meaning. It is registered as `torch.ops.effopt.<name>` with a composite
implementation, so a graph that holds canonical ops always runs: eager executes the reference,
autograd differentiates it, and AOTAutograd inlines it for Inductor to fuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Operands = Mapping[str, Any]
"""Schema argument name -> value. Tensors are fake or real; sizes may be symbolic."""

_LIBRARY = torch.library.Library("effopt", "DEF")


@dataclass(frozen=True)
class Sample:
    """One call of an op, for tests: fresh tensors for every draw."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Op:
    """A canonical op. `overload` is what stands in a graph; the rest is what it means and costs."""

    name: str
    overload: torch._ops.OpOverload
    reference: Callable[..., Any]
    """Plain PyTorch, accumulation dtype written out. The oracle of every lowering."""
    fake: Callable[..., Any]
    """Shape, dtype and stride rule on fake tensors; the reference itself unless given."""
    flops: Callable[[Operands, Any], float]
    """Floating-point operations of (operands, result)."""
    samples: Callable[[torch.dtype, torch.device], Iterable[Sample]]
    """Calls over ordinary and odd shapes, for one floating dtype and device."""
    reference_bytes: Callable[[Operands, Any], float] | None = None
    """Bytes that the reference moves beyond its operands and result, where it makes something large."""
    least_bytes: Callable[[Operands, Any], float] | None = None
    """Fewest bytes of (operands, result), where only a part of an operand is read."""
    contents: Callable[[Operands], Operands] | None = None
    """Made-up operands -> those that hold what a call might, where other numbers would be no call at all."""

    def bytes_moved(self, operands: Operands, result: Any) -> float:
        """Fewest bytes: each operand read once, each result written once, unless the op counts itself."""
        if self.least_bytes is not None:
            return self.least_bytes(operands, result)
        return float(sum(tensor_bytes(v) for v in (*operands.values(), result)))

    @property
    def schema(self) -> str:
        """Its arguments and results, as `torch.library` writes them, for a kernel of the same."""
        return str(self.overload._schema).partition(self.name)[2]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by schema name, with the schema's defaults filled in."""
        return bind_schema(self.overload, args, kwargs)


def tensor_bytes(value: Any) -> float:
    """Bytes of the distinct elements of every tensor in `value` (expanded dimensions count once)."""
    if isinstance(value, torch.Tensor):
        count = 1
        for size, stride in zip(value.shape, value.stride(), strict=True):
            if not (isinstance(stride, int) and stride == 0):
                count = count * size
        return float(hint(count) * value.element_size())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(v) for v in value)
    return 0.0


def hint(size: int | torch.SymInt) -> int:
    """A number for a size: itself, or the hint of a symbol (1 where it has none). Adds no guard."""
    if isinstance(size, torch.SymInt):
        found = size.node.hint
        return int(found) if found is not None else 1
    return int(size)


def bind_schema(
    overload: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by schema name, with defaults filled in, in schema order."""
    bound = {}
    for i, argument in enumerate(overload._schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def elementwise_flops(per_element: float) -> Callable[[Operands, Any], float]:
    """A cost rule: `per_element` operations for each element of the first tensor of the result."""

    def flops(_: Operands, result: Any) -> float:
        first = result[0] if isinstance(result, (list, tuple)) else result
        return per_element * hint(first.numel())

    return flops


def op(
    *,
    flops: Callable[[Operands, Any], float],
    samples: Callable[[torch.dtype, torch.device], Iterable[Sample]],
    fake: Callable[..., Any] | None = None,
    reference_bytes: Callable[[Operands, Any], float] | None = None,
    least_bytes: Callable[[Operands, Any], float] | None = None,
    contents: Callable[[Operands], Operands] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Make the decorated reference function the canonical op `effopt::<its name>`."""

    def define(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        schema = torch.library.infer_schema(reference, mutates_args=())
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
        overload = getattr(torch.ops.effopt, name).default
        rules = (flops, samples, reference_bytes, least_bytes, contents)
        return Op(name, overload, reference, fake or reference, *rules)

    return define


def adopt(
    overload: torch._ops.OpOverload,
    *,
    name: str,
    flops: Callable[[Operands, Any], float],
    samples: Callable[[torch.dtype, torch.device], Iterable[Sample]],
) -> Op:
    """Take an ATen op as a canonical op: it is already the one spelling, only cost is added."""
    return Op(name, overload, overload, overload, flops, samples)
