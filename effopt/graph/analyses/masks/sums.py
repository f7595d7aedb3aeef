"""Whole numbers as functions of the place in a mask, (batch, head, query, key): sums of atoms.

Equal meaning is equal value wherever the constructors can see to it, so that sums are compared with `==`.
Sums are taken in the integers. Signed 64-bit overflow is undefined in the kernels that the original runs;
narrower types, which wrap, are read only where `reading.py` bounds their values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.values import val


@dataclass(frozen=True)
class Axis:
    """The index of a place along one axis, from 0 up to `size`."""

    name: str
    size: Any = field(compare=False)


@dataclass(frozen=True)
class Symbol:
    """A whole number that is known when the graph runs, the same for all places."""

    expression: str
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Element:
    """An element of a tensor about whose values nothing is read."""

    node: Node
    at: tuple[Sum, ...]


@dataclass(frozen=True)
class Quotient:
    """`of // by`, rounded down; `by` is positive."""

    of: Sum
    by: int


@dataclass(frozen=True)
class Magnitude:
    """The absolute value."""

    of: Sum


@dataclass(frozen=True)
class Opaque:
    """Any other pointwise function of what is at the same place."""

    target: Any
    """An ATen op; or a pair: `("to", dtype)`, or a division and its rounding mode."""
    of: tuple[Any, ...]

    @property
    def is_cast(self) -> bool:
        """Whether it is a change of dtype."""
        return isinstance(self.target, tuple) and self.target[0] == "to"


Atom: TypeAlias = Axis | Symbol | Element | Quotient | Magnitude | Opaque


@dataclass(frozen=True)
class Sum:
    """`constant + sum of coefficient * atom`; no coefficient is 0."""

    terms: frozenset[tuple[Atom, int]] = frozenset()
    constant: int = 0

    def __add__(self, other: Sum | int) -> Sum:
        other = whole(other) if isinstance(other, int) else other
        found = dict(self.terms)
        for atom, by in other.terms:
            found[atom] = found.get(atom, 0) + by
        return Sum(frozenset((a, c) for a, c in found.items() if c), self.constant + other.constant)

    def __mul__(self, by: int) -> Sum:
        if not by:
            return whole(0)
        return Sum(frozenset((a, c * by) for a, c in self.terms), self.constant * by)

    def __sub__(self, other: Sum | int) -> Sum:
        return self + (-other if isinstance(other, int) else other * -1)

    @property
    def number(self) -> int | None:
        """The value, if it is the same everywhere and known."""
        return None if self.terms else self.constant

    @property
    def only(self) -> Atom | None:
        """The atom that the sum is, if it is just one."""
        ((atom, by),) = self.terms if len(self.terms) == 1 else ((None, 0),)
        return atom if by == 1 and not self.constant else None


def whole(number: int) -> Sum:
    """A number as a sum."""
    return Sum(constant=int(number))


def of(atom: Atom) -> Sum:
    """An atom as a sum. An axis of length 1 is 0."""
    if isinstance(atom, Axis) and statically_known_true(atom.size == 1):
        return whole(0)
    return Sum(frozenset({(atom, 1)}))


def quotient(of_: Sum, by: int) -> Sum:
    """`of_ // by`, rounded down."""
    if by == 1:
        return of_
    return whole(of_.constant // by) if of_.number is not None else of(Quotient(of_, by))


def divided(of_: Sum, by: int) -> Sum:
    """`of_ // by`, rounded down, with no more in the quotient than it hangs on."""
    times, rest = _multiples(of_, by)
    for unit in sorted({by, *(abs(k) for _, k in rest.terms if by % k == 0)}, reverse=True):
        above, below = _multiples(rest, unit)
        low, high = lowest(below), highest(below)
        if low is None or high is None or unit == 1:
            continue
        if statically_known_true(low >= 0) and statically_known_true(high < unit):
            # Less than one unit decides nothing: (8 * i + j) // 32 is i // 4 where 0 <= j < 8.
            return times + (quotient(above, by // unit) if unit < by else above)
    return times + quotient(rest, by)


def _multiples(s: Sum, by: int) -> tuple[Sum, Sum]:
    """`(a, b)` with `s == by * a + b`."""
    times = Sum(frozenset((a, k // by) for a, k in s.terms if k % by == 0), s.constant // by)
    return times, s - times * by


def magnitude(of_: Sum) -> Sum:
    """The absolute value; of a difference, the same for either order."""
    if of_.number is not None:
        return whole(abs(of_.number))
    turned = of_ * -1
    return of(Magnitude(min(of_, turned, key=sort_key)))


def sort_key(s: Sum) -> str:
    return repr(sorted(f"{a!r}{c}" for a, c in s.terms)) + str(s.constant)


def lowest(s: Sum) -> Any | None:
    """A number, perhaps symbolic, that a sum is never below; None if none is known."""
    total: Any = s.constant
    for atom, by in s.terms:
        edge = _edges(atom)[0 if by > 0 else 1]
        if edge is None:
            return None
        total = total + by * edge
    return total


def highest(s: Sum) -> Any | None:
    """A number, perhaps symbolic, that a sum is never above; None if none is known."""
    negated = lowest(s * -1)
    return None if negated is None else -negated


def _edges(atom: Atom) -> tuple[Any | None, Any | None]:
    if isinstance(atom, Axis):
        return 0, atom.size - 1
    if isinstance(atom, Symbol):
        return val(atom.node), val(atom.node)
    if isinstance(atom, Element) and val(atom.node).dtype != torch.int64:
        info = torch.iinfo(val(atom.node).dtype)
        return info.min, info.max
    if isinstance(atom, Magnitude):
        low, high = lowest(atom.of), highest(atom.of)
        if isinstance(low, int) and isinstance(high, int):
            return 0, max(abs(low), abs(high))
        return 0, None
    if isinstance(atom, Quotient):
        low, high = lowest(atom.of), highest(atom.of)
        return None if low is None else low // atom.by, None if high is None else high // atom.by
    return None, None
