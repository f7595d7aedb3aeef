"""Sums of products, however they are spelled: einsum, matmul, broadcast multiplication and sum.

    einsum("bin,bjn->bij", q, k) * w    at (b, i, j):  sum over n of q[b, i, n] * k[b, j, n] * w[i, j]

`product_at` reads the graph of one element as that. Looks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.causal_distance import origin_of
from effopt.graph.analyses.einsum_letters import letters_of
from effopt.graph.analyses.masks.moves import Place, aligned
from effopt.graph.analyses.masks.sums import Axis, Sum, of, whole
from effopt.graph.analyses.placed import Placed
from effopt.graph.values import shape_of

_aten = torch.ops.aten
_MOST_DEPTH = 10
"""Products of products are as many as two to this; Mamba-2 in `transformers` takes 3."""


@dataclass(frozen=True)
class Product:
    """Factors, each read at a place, multiplied and summed over axes of their own."""

    factors: tuple[Placed, ...]
    summed: Mapping[str, Placed] = field(default_factory=dict)
    """Name of each axis that is summed over, and the call that sums, at the place where it is read."""

    def named(self, names: Mapping[str, str]) -> Product:
        """With other names for its axes."""
        factors = tuple(_named(f, names) for f in self.factors)
        return Product(factors, {names.get(x, x): _named(by, names) for x, by in self.summed.items()})


def _named(placed: Placed, names: Mapping[str, str]) -> Placed:
    return Placed(placed.node, named(placed.at, names))


def named(place: Place, names: Mapping[str, str]) -> Place:
    """A place with other names for its axes."""

    def other(at: Sum) -> Sum:
        total = whole(at.constant)
        for atom, by in at.terms:
            known = isinstance(atom, Axis) and atom.name in names
            total = total + of(Axis(names[atom.name], atom.size) if known else atom) * by  # type: ignore[union-attr]
        return total

    return tuple(map(other, place))


def product_at(node: Node, place: Place, depth: int = _MOST_DEPTH) -> Product:
    """What an element of `node` is a product of, `depth` calls down; itself where it is none."""
    node, place = origin_of(node, place)
    found = _RULES[node.target](node, place) if node.target in _RULES and depth else None
    if found is None:
        return Product((Placed(node, place),))
    operands, summed = found
    parts = [product_at(operand, at, depth - 1) for operand, at in operands]
    factors = tuple(f for part in parts for f in part.factors)
    names = [*summed, *(name for part in parts for name in part.summed)]
    if len(set(names)) < len(names):
        # A sum that is a factor twice has two axes, and one name.
        return Product((Placed(node, place),))
    inner = {name: by for part in parts for name, by in part.summed.items()}
    return Product(factors, {name: Placed(node, place) for name in summed} | inner)


_Parts = tuple[list[tuple[Node, Place]], list[str]]


def _fresh(node: Node, letter: Any, size: Any, summed: list[str]) -> Sum:
    """The index of an axis that `node` sums over; one of size 1 is no axis."""
    axis = Axis(f"{node.name} over {letter}", size)
    if of(axis).number is None:
        summed.append(axis.name)
    return of(axis)


def _mul(node: Node, place: Place) -> _Parts | None:
    operands: Any = node.args
    if not all(isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor) for x in operands):
        return None
    return _parts([(x, aligned(x, shape_of(node), place)) for x in operands], [])


def _parts(given: Sequence[tuple[Node, Place | None]], summed: list[str]) -> _Parts | None:
    """None where it is open whether a symbolic size broadcasts."""
    known = [(x, at) for x, at in given if at is not None]
    return (known, summed) if len(known) == len(given) else None


def _einsum(node: Node, place: Place) -> _Parts | None:
    found = letters_of(str(node.args[0]))
    if found is None:
        return None
    operands: Any = node.args[1]
    words, out = found
    sizes: dict[str, Any] = dict(zip(out, shape_of(node), strict=True))
    for x, word in zip(operands, words, strict=True):
        inner = zip(word, shape_of(x), strict=True)
        sizes |= {a: n for a, n in inner if a not in out and not statically_known_true(n == 1)}
    known, summed = dict(zip(out, place, strict=True)), list[str]()
    for letter in dict.fromkeys("".join(words)):
        if letter not in known:
            known[letter] = _fresh(node, letter, sizes.get(letter, 1), summed)
    at = [_by_letter(x, word, known, sizes) for x, word in zip(operands, words, strict=True)]
    return _parts(list(zip(operands, at, strict=True)), summed)


def _by_letter(x: Node, word: str, known: Mapping[str, Sum], sizes: Mapping[str, Any]) -> Place | None:
    frame, place = [sizes.get(a, 1) for a in word], tuple(known[a] for a in word)
    return aligned(x, frame, place)


def _matmul(node: Node, place: Place) -> _Parts | None:
    left, right = node.args[:2]
    ranks = [len(shape_of(x)) for x in (left, right)]
    if min(ranks) < 2 or not isinstance(left, Node) or not isinstance(right, Node):
        return None
    summed: list[str] = []
    inner = _fresh(node, "k", shape_of(left)[-1], summed)
    frames = (
        (left, (*shape_of(node)[:-1], shape_of(left)[-1]), (*place[:-1], inner)),
        (right, (*shape_of(node)[:-2], *shape_of(right)[-2:]), (*place[:-2], inner, place[-1])),
    )
    return _parts([(x, aligned(x, frame, p)) for x, frame, p in frames], summed)


def _sum(node: Node, place: Place) -> _Parts | None:
    source: Any = node.args[0]
    sizes = shape_of(source)
    dims: Sequence[Any] = node.args[1] if len(node.args) > 1 and node.args[1] else range(len(sizes))  # type: ignore[assignment]
    over = {int(d) % len(sizes) for d in dims}
    keeps = len(place) == len(sizes)
    if node.kwargs.get("dtype") is not None or not (keeps or len(place) == len(sizes) - len(over)):
        return None
    summed: list[str] = []
    rest = [at for d, at in enumerate(place) if d not in over] if keeps else list(place)
    at = tuple(_fresh(node, d, size, summed) if d in over else rest.pop(0) for d, size in enumerate(sizes))
    return [(source, at)], summed


_RULES: dict[Any, Any] = {
    _aten.mul.Tensor: _mul,
    _aten.einsum.default: _einsum,
    _aten.matmul.default: _matmul,
    _aten.bmm.default: _matmul,
    _aten.sum.dim_IntList: _sum,
}
