"""Truth values as functions of the place in a mask.

Conjunctions and disjunctions of `sum <= 0`, `sum == 0` and elements of boolean tensors, simplified when they
are made: what the bounds of the axes decide is `TRUE` or `FALSE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.masks.sums import (
    Atom,
    Axis,
    Element,
    Magnitude,
    Opaque,
    Quotient,
    Sum,
    highest,
    lowest,
    magnitude,
    of,
    quotient,
    sort_key,
    whole,
)


@dataclass(frozen=True)
class Origin:
    """A node whose element at `at` is a condition."""

    node: Node
    at: tuple[Sum, ...]


@dataclass(frozen=True)
class AtMost:
    """`of <= 0`."""

    of: Sum
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Equal:
    """`of == 0`."""

    of: Sum
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Given:
    """An element of a boolean tensor about whose values nothing is read."""

    node: Node
    at: tuple[Sum, ...]
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Not:
    """The contrary of an `Equal` or a `Given`."""

    of: Equal | Given
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class All:
    """True where all are; `All()` is true."""

    of: frozenset[Condition] = frozenset()
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Some:
    """True where one is; `Some()` is false."""

    of: frozenset[Condition] = frozenset()
    origin: Origin | None = field(default=None, compare=False)


Condition: TypeAlias = AtMost | Equal | Given | Not | All | Some
TRUE, FALSE = All(), Some()


def at_most(s: Sum) -> Condition:
    """`s <= 0`, decided where bounds decide it."""
    high, low = highest(s), lowest(s)
    if high is not None and statically_known_true(high <= 0):
        return TRUE
    if low is not None and statically_known_true(low > 0):
        return FALSE
    for atom, by in s.terms:
        if isinstance(atom, Magnitude) and by == 1:
            rest = s - of(atom)
            return every(at_most(atom.of + rest), at_most(rest - atom.of))
    return AtMost(s)


def equal(s: Sum) -> Condition:
    """`s == 0`, decided where bounds decide it; the same for `-s`. The first key is one below 1."""
    if s.number is not None:
        return TRUE if s.number == 0 else FALSE
    low, high = lowest(s), highest(s)
    if (low is not None and statically_known_true(low > 0)) or (
        high is not None and statically_known_true(high < 0)
    ):
        return FALSE
    if not {"query", "key"} <= axes_of(s):
        for turned, bound in ((s, low), (s * -1, None if high is None else -high)):
            if bound is not None and statically_known_true(bound >= 0):
                return at_most(turned)
    return Equal(min(s, s * -1, key=sort_key))


def every(*conditions: Condition) -> Condition:
    """The conjunction."""
    return _joined(All, Some, conditions)


def some(*conditions: Condition) -> Condition:
    """The disjunction. What all have in common stands before it, once."""
    found = _joined(Some, All, conditions)
    if not isinstance(found, Some) or not found.of:
        return found
    parts = [c.of if isinstance(c, All) else frozenset({c}) for c in found.of]
    common = frozenset.intersection(*parts)
    return every(*common, some(*(every(*(p - common)) for p in parts))) if common else found


def _joined(kind: Any, other: Any, conditions: Iterable[Condition]) -> Condition:
    flat: dict[Condition, None] = {}
    for c in conditions:
        for part in c.of if isinstance(c, kind) else (c,):
            flat[part] = None
    if any(isinstance(c, other) and not c.of for c in flat):
        return other()
    if len(flat) == 1:
        return next(iter(flat))
    return kind(frozenset(flat))


def negated(c: Condition) -> Condition:
    """The contrary."""
    if isinstance(c, AtMost):
        return at_most(whole(1) - c.of)
    if isinstance(c, Not):
        return c.of
    if isinstance(c, All):
        return some(*(negated(x) for x in c.of))
    if isinstance(c, Some):
        return every(*(negated(x) for x in c.of))
    return Not(c)


def replaced(value: Any, axes: Mapping[str, Sum]) -> Any:
    """A sum or a condition with sums in place of some axes, simplified again."""
    again: Callable[[Any], Any] = lambda x: replaced(x, axes)  # noqa: E731
    if isinstance(value, Sum):
        total = whole(value.constant)
        for atom, by in value.terms:
            total = total + _replaced_atom(atom, axes, again) * by
        return total
    if isinstance(value, AtMost):
        return at_most(again(value.of))
    if isinstance(value, Equal):
        return equal(again(value.of))
    if isinstance(value, Given):
        return Given(value.node, tuple(map(again, value.at)))
    if isinstance(value, Not):
        return negated(again(value.of))
    if isinstance(value, (All, Some)):
        return (every if isinstance(value, All) else some)(*map(again, value.of))
    if isinstance(value, (Element, Opaque)):
        return _replaced_atom(value, axes, again).only
    return value


def _replaced_atom(atom: Atom, axes: Mapping[str, Sum], again: Callable[[Any], Any]) -> Sum:
    if isinstance(atom, Axis):
        return axes.get(atom.name, of(atom))
    if isinstance(atom, Element):
        return of(Element(atom.node, tuple(map(again, atom.at))))
    if isinstance(atom, Quotient):
        return quotient(again(atom.of), atom.by)
    if isinstance(atom, Magnitude):
        return magnitude(again(atom.of))
    if isinstance(atom, Opaque):
        return of(Opaque(atom.target, tuple(map(again, atom.of))))
    return of(atom)


def axes_of(value: Any) -> frozenset[str]:
    """Names of the axes that a value, or a place, depends on."""
    if isinstance(value, Axis):
        return frozenset({value.name})
    if isinstance(value, Sum):
        parts: Iterable[Any] = (atom for atom, _ in value.terms)
    elif isinstance(value, tuple):
        parts = value
    elif isinstance(value, (Element, Given)):
        parts = value.at
    elif isinstance(value, (All, Some, Opaque)):
        parts = value.of
    elif isinstance(value, (AtMost, Equal, Not, Quotient, Magnitude)):
        parts = (value.of,)
    else:
        parts = ()
    return frozenset().union(*map(axes_of, parts))
