"""Masks that a model holds in buffers, as functions of their indices, and the guard on each.

`register_buffer("bias", torch.tril(torch.ones(n, n)))` is a band of two values. What it
holds may be written between calls, so the fact is a guard: it is looked at again whenever the buffer was
written, replaced or is another module's, and code that stands on it runs only while it holds. Writes are
known as autograd knows them: one through `.data`, which PyTorch does not count, is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph.derivation import State, is_in_state, state_of
from effopt.graph.values import MUTATED, val

STANDS_ON = "stands-on-buffers"
"""What a pass provides that changes a graph by a fact about a buffer."""
_MOST_ELEMENTS = 1 << 27
_MOST_STATES = 64
"""Buffers remembered for one input: code that Dynamo compiled for one module serves others of its class."""


@dataclass(frozen=True)
class Band:
    """`inside` where low <= column - row <= high of the last two dimensions, else `outside`."""

    low: int | None
    high: int | None
    inside: Any
    outside: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    def holds(self, x: Any) -> bool:
        """Whether a tensor is just this."""
        alike = isinstance(x, Tensor) and tuple(x.shape) == self.shape and x.dtype == self.dtype
        return alike and bool((x == _laid_out(self, x)).all())


def band_of(x: Tensor) -> Band | None:
    """The band that a tensor of two values is, or None. The diagonal's first element is inside."""
    t, s = x.shape[-2:] if x.dim() > 1 else (0, 0)
    if min(t, s) < 2 or x.numel() != t * s or x.numel() > _MOST_ELEMENTS or x.dtype.is_complex:
        return None
    plane = x.reshape(t, s)
    inside = plane == plane[0, 0]
    values = plane[~inside]
    if not len(values):
        return None
    # The row and the column from the first element tell where the two values part.
    low, high = (_reach(line) for line in (inside[:, 0], inside[0]))
    found = Band(
        None if low is None else -low, high, plane[0, 0].item(), values[0].item(), tuple(x.shape), x.dtype
    )
    return found if found.holds(x) else None


def _reach(line: Tensor) -> int | None:
    """Index of the last of the leading True; None if all are."""
    (closed,) = (~line).nonzero(as_tuple=True)
    return int(closed[0]) - 1 if len(closed) else None


def _laid_out(band: Band, like: Tensor) -> Tensor:
    t, s = band.shape[-2:]
    apart = torch.arange(s, device=like.device) - torch.arange(t, device=like.device).unsqueeze(-1)
    seen = torch.ones_like(apart, dtype=torch.bool)
    if band.low is not None:
        seen &= apart >= band.low
    if band.high is not None:
        seen &= apart <= band.high
    inside, outside = (like.new_full((), v) for v in (band.inside, band.outside))
    return torch.where(seen, inside, outside).view(band.shape)


@dataclass(eq=False)
class HeldMasks:
    """The facts about buffers that one graph stands on."""

    inputs: Sequence[Any] = ()
    """The real inputs of the compile call."""
    _facts: dict[int, Band] = field(default_factory=dict)
    _known: dict[int, list[tuple[State, bool]]] = field(default_factory=dict)
    """Buffers that were looked at, and whether they hold the band."""

    def __bool__(self) -> bool:
        return bool(self._facts)

    def read(self, node: Node, position: int) -> Band | None:
        """The band that the buffer of a placeholder holds; None if there is none to stand on."""
        dynamo = node.meta.get("tensor_dict") or {}
        value = self.inputs[position] if position < len(self.inputs) else None
        is_buffer = "_dynamo_static_input_type" in dynamo and not isinstance(value, torch.nn.Parameter)
        if not is_buffer or type(value) is not Tensor or value.is_inference() or value.is_sparse:
            return None
        if value.requires_grad or position in node.graph.output_node().meta.get(MUTATED, ()):
            return None
        return band_of(value) if tuple(val(node).shape) == tuple(value.shape) else None

    def stand_on(self, position: int, band: Band) -> None:
        """Guard a fact that `read` gave: the graph was changed by it."""
        self._facts[position] = band

    def hold(self, inputs: Sequence[Any]) -> bool:
        """Whether all facts hold for a call with these inputs. A tensor is read once after each write."""
        return all(self._holds(inputs[position], position, band) for position, band in self._facts.items())

    def _holds(self, value: Any, position: int, band: Band) -> bool:
        known = self._known.setdefault(position, [])
        for state, answer in known:
            if is_in_state(value, state):
                return answer
        answer = band.holds(value)
        others = [entry for entry in known if entry[0][0]() is not None and entry[0][0]() is not value]
        known[:] = [*others, (state_of(value), answer)][-_MOST_STATES:]
        return answer

    def forget_inputs(self) -> None:
        """After compiling: keep no tensor alive that the model has replaced."""
        self.inputs = ()
