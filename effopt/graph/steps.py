"""Writes what all steps of a loop compute at once, as calls on whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.factors import call_of
from effopt.graph.analyses.lockstep import Apply, Series
from effopt.graph.analyses.over_time import Taken, Timed, operands_of, taken
from effopt.graph.rewrite import Emit
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten


@dataclass(frozen=True)
class Steps:
    """The steps of one loop."""

    emit: Emit
    sizes: Mapping[str, Any]
    """Of each axis, by its letter; `t` is time."""
    backwards: bool
    """Whether the first step reads the last position; what is written has the first step first."""

    def product(self, factors: Sequence[Timed], axes: Sequence[str]) -> Node:
        """The product of values, with these axes in full."""
        laid = [self.laid_out(factor, axes) for factor in factors]
        if len(laid) > 1:
            laid = [
                self.emit.cast(node, f.dtype) if f.dtype else node
                for node, f in zip(laid, factors, strict=True)
            ]
        first, *others = laid
        for other in others:
            first = self.emit(_aten.mul.Tensor, first, other)
        return self.expanded(first, axes)

    def laid_out(self, found: Timed, axes: Sequence[str]) -> Node:
        """A value by these axes; those that it has not are of size 1."""
        if not isinstance(found.value, Node):
            return self._called(found, axes)
        node, kept = found.value, [axis for axis in axes if axis in found.letters]
        for dim in reversed(range(len(found.axes))):
            if found.axes[dim] is None:
                node = self.emit(_aten.select.int, node, dim, 0)
        have = [axis for axis in found.axes if axis is not None]
        order = [have.index(axis) for axis in kept]
        if order != sorted(order):
            node = self.emit(_aten.permute.default, node, order)
        for dim, axis in enumerate(axes):
            if axis not in kept:
                node = self.emit(_aten.unsqueeze.default, node, dim)
        return self.emit(_aten.flip.default, node, [list(axes).index("t")]) if self._turns(kept) else node

    def _turns(self, axes: Sequence[str]) -> bool:
        return self.backwards and "t" in axes

    def _called(self, found: Timed, axes: Sequence[str]) -> Node:
        call, part = found.value, taken(found)
        if part is not None:
            return self._part(call, part, axes)
        args = [self._argument(found, value, axes) for value in call.args]
        kwargs = {name: self._argument(found, value, axes) for name, value in call.kwargs.items()}
        made = self.emit(call.target, *args, **kwargs)
        # A number in each step may be a tensor of all: it takes part in the promotion of dtypes.
        dtype = val(call.nodes[0]).dtype
        return self.emit.cast(made, dtype)

    def _part(self, call: Apply, part: Taken, axes: Sequence[str]) -> Node:
        node = self.laid_out(part.inner, (*axes, part.hidden))
        place = call_of(call)[1][2:]  # type: ignore[index]
        node = self.emit(call.target, node, -1, *place)
        if call.target is _aten.select.int:
            return node
        if part.becomes is not None:
            node = self.emit(_aten.transpose.int, node, list(axes).index(part.becomes), -1)
        return self.emit(_aten.select.int, node, -1, 0)

    def _argument(self, found: Timed, value: Any, axes: Sequence[str]) -> Any:
        if not isinstance(value, Series | Node):
            return value
        operand = operands_of(found, value)
        if not isinstance(operand.value, Series | Node):
            return operand.value
        # What was widened in each step is computed with as it was then, not as it is held.
        node = self.laid_out(operand, axes)
        return node if operand.dtype is None else self.emit.cast(node, operand.dtype)

    def expanded(self, node: Node, axes: Sequence[str]) -> Node:
        """A value with every axis in full."""
        sizes = [self.sizes[axis] for axis in axes]
        own = shape_of(node)
        is_whole = all(statically_known_true(a == b) for a, b in zip(own, sizes, strict=True))
        return node if is_whole else self.emit(_aten.expand.default, node, sizes)
