"""The form of a mask: which of the shapes that models use it is, and what stays a tensor, and why.

    form_of(mask)   a boolean mask, open where all terms hold
    bias_of(bias)   a bias: a form that hides keys by huge negative numbers, and what is added besides

A term says something of (batch, head, query, key), indices from 0. Offsets and limits are sums that no query
or key changes: numbers, sizes, or elements of tensors, perhaps one for each batch entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch.fx import Node

from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.moves import Place
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.analyses.masks.runs import Run, distance_within, runs_of
from effopt.graph.analyses.masks.sums import Axis, Element, Quotient, Sum, of, whole
from effopt.graph.values import shape_of

AXES = ("batch", "head", "query", "key")


@dataclass(frozen=True)
class Band:
    """low <= key - query <= high; None where there is no such bound."""

    low: Sum | None = None
    high: Sum | None = None
    origins: tuple[c.Origin | None, ...] = field(default=(), compare=False)
    """Of the conditions that it is made of."""


@dataclass(frozen=True)
class Groups:
    """Query and key have the same number: of a chunk of positions, of a document."""

    query: Sum
    key: Sum
    chunk: int | None = None
    """Positions in a group, if the number is that of a chunk."""
    origin: c.Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Length:
    """key < limit."""

    limit: Sum
    origin: c.Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Keys:
    """A condition on batch, head and key alone: padding."""

    condition: c.Condition
    origin: c.Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Rows:
    """A condition on batch, head and query alone."""

    condition: c.Condition
    origin: c.Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RowLimit:
    """key <= limit, and the limit differs between queries in a way that only a tensor tells."""

    limit: Sum
    origin: c.Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Prefix:
    """key < limit, or all of `otherwise`."""

    limit: Sum
    otherwise: tuple[Term, ...]
    origin: c.Origin | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Unread:
    """A condition on query and key together that has none of the forms."""

    condition: c.Condition
    origin: c.Origin | None = field(default=None, compare=False)


Term: TypeAlias = Band | Groups | Length | Keys | Rows | RowLimit | Prefix | Unread


@dataclass(frozen=True)
class Form:
    """A mask as the conjunction of its terms. No terms: open everywhere; `closed`: nowhere."""

    terms: tuple[Term, ...]
    condition: c.Condition = field(compare=False)
    """All of it."""

    @property
    def closed(self) -> bool:
        """Whether no query sees a key."""
        return self.condition == c.FALSE

    @property
    def band(self) -> Band:
        """The band among the terms."""
        return next((t for t in self.terms if isinstance(t, Band)), Band())

    def unread(self) -> list[Node]:
        """The nodes at which the reading stopped, for terms that have no form, as far as they are known."""
        found: dict[Node, None] = {}
        for term in _each(self.terms):
            if isinstance(term, Unread):
                own = [term.origin.node] if term.origin is not None else []
                found.update(dict.fromkeys(_stops(term.condition) or own))
        return list(found)

    @property
    def is_read(self) -> bool:
        """Whether every term has a form, those beside a prefix too."""
        return not any(isinstance(term, Unread) for term in _each(self.terms))


def _each(terms: Iterable[Term]) -> Iterator[Term]:
    for term in terms:
        yield term
        if isinstance(term, Prefix):
            yield from _each(term.otherwise)


def places(sizes: tuple[Any, ...]) -> Place:
    """The place (batch, head, query, key) of a mask with these sizes, counted from the last."""
    names = AXES[len(AXES) - len(sizes) :]
    return tuple(of(Axis(name, size)) for name, size in zip(names, sizes, strict=True))


def form_of(mask: Node, reader: Reader | None = None) -> Form:
    """The form of a boolean mask of 1 to 4 dimensions."""
    return form_of_condition((reader or Reader()).at(mask, places(shape_of(mask))))


def form_of_condition(condition: c.Condition) -> Form:
    """The form of what was read."""
    parts = condition.of if isinstance(condition, c.All) else (condition,)
    return Form(_merged(_term(p) for p in sorted(parts, key=repr)), condition)


def _term(p: c.Condition) -> Term:
    axes, origin = c.axes_of(p), getattr(p, "origin", None)
    if "query" in axes and "key" in axes:
        return _of_both(p, origin)
    if "key" in axes and isinstance(p, c.AtMost):
        limit = _alone(p.of, "key", 1)
        if limit is not None:
            return Length(whole(1) - limit, origin)
    return (Keys if "key" in axes else Rows)(p, origin)


def _of_both(p: c.Condition, origin: c.Origin | None) -> Term:
    if isinstance(p, c.AtMost):
        band = _band(p.of)
        limit = _alone(p.of, "key", 1)
        if band is not None:
            return replace(band, origins=(origin,))
        if limit is not None and "key" not in c.axes_of(limit):
            return RowLimit(limit * -1, origin)
    if isinstance(p, c.Equal):
        groups = _groups(p, origin)
        if groups is not None:
            return groups
    if isinstance(p, c.Some):
        return _prefix(p, origin)
    return Unread(p, origin)


def _alone(s: Sum, axis: str, by: int) -> Sum | None:
    """What is left of a sum without `by * axis`, if it has that and the axis is nowhere else in it."""
    for atom, coefficient in s.terms:
        if isinstance(atom, Axis) and atom.name == axis and coefficient == by:
            rest = s - of(atom) * by
            return None if axis in c.axes_of(rest) else rest
    return None


def _band(s: Sum) -> Band | None:
    for by in (1, -1):
        rest = _alone(s, "key", by)
        rest = None if rest is None else _alone(rest, "query", -by)
        if rest is not None:
            return Band(high=rest * -1) if by == 1 else Band(low=rest)
    return None


def _groups(p: c.Equal, origin: c.Origin | None) -> Groups | None:
    """Two numbers that are equal: one of the query, one of the key."""
    sides = {"query": whole(0), "key": whole(p.of.constant)}
    for atom, by in p.of.terms:
        of_query, of_key = "query" in c.axes_of(atom), "key" in c.axes_of(atom)
        if of_query and of_key:
            return None
        side = "query" if of_query else "key"
        sides[side] = sides[side] + of(atom) * by
    query, key = sides["query"], sides["key"] * -1
    if any(by < 0 for _, by in query.terms) and any(by < 0 for _, by in key.terms):
        query, key = query * -1, key * -1
    one, other = query.only, key.only
    chunked = isinstance(one, Quotient) and isinstance(other, Quotient) and one.by == other.by
    return Groups(query, key, one.by if chunked and isinstance(one, Quotient) else None, origin)


def _prefix(p: c.Some, origin: c.Origin | None) -> Term:
    for part in sorted(p.of, key=repr):
        first = _term(part)
        if isinstance(first, Length):
            rest = form_of_condition(c.some(*(p.of - {part})))
            return Prefix(first.limit, rest.terms, origin)
    return Unread(p, origin)


def _merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Bands that bound different sides as one, and positions within documents as indices."""
    found = list(terms)
    runs = {r for t in found if isinstance(t, Groups) for r in runs_of(t.query, t.key)}
    low: list[Sum] = []
    high: list[Sum] = []
    origins: list[c.Origin | None] = []
    rest: list[Term] = []
    for term in found:
        band = term if isinstance(term, Band) else _within_runs(term, runs)
        if band is None or len(low) + (band.low is not None) > 1 or len(high) + (band.high is not None) > 1:
            narrower = None if band is None else _narrower(band, low, high)
            if narrower is None:
                rest.append(term)
            else:
                origins += narrower.origins
            continue
        origins += band.origins
        low += [band.low] if band.low is not None else []
        high += [band.high] if band.high is not None else []
    band = Band(low[0] if low else None, high[0] if high else None, tuple(origins))
    return (*([band] if low or high else []), *rest)


def _narrower(band: Band, low: list[Sum], high: list[Sum]) -> Band | None:
    """Put the narrower of two bounds that differ by a number in place; None if they cannot be compared."""
    for bounds, one, closer in ((low, band.low, 1), (high, band.high, -1)):
        if one is None:
            continue
        if not bounds:
            bounds.append(one)
            continue
        apart = (one - bounds[0]).number
        if apart is None:
            return None
        if apart * closer > 0:
            bounds[0] = one
    return band


def _within_runs(term: Term, runs: set[Run]) -> Band | None:
    """`position[key] <= position[query] + n` among positions that grow as indices do."""
    condition = getattr(term, "condition", None)
    distance = distance_within(condition.of, runs) if runs and isinstance(condition, c.AtMost) else None
    band = None if distance is None else _band(distance)
    return None if band is None else replace(band, origins=(getattr(term, "origin", None),))


def _stops(value: Any) -> list[Node]:
    """Nodes of the elements in a condition that hang on query and key both, or of all if none does."""
    found: dict[Node, bool] = {}

    def walk(v: Any) -> None:
        if isinstance(v, (Element, c.Given)):
            found[v.node] = {"query", "key"} <= c.axes_of(v)
        parts = [a for a, _ in v.terms] if isinstance(v, Sum) else getattr(v, "of", ())
        for part in parts if isinstance(parts, (tuple, list, frozenset)) else (parts,):
            walk(part)

    walk(value)
    return [n for n, both in found.items() if both] or list(found)
