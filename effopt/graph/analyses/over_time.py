"""What each step of a loop computes of parts of tensors, as what all steps compute at once.

    elu(select(k, 2, 0)), elu(select(k, 2, 1)), ..        elu(k), its axes known by letters

Only calls that are pointwise, and products; what lays values out is followed. Looks only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.einsum_letters import letters_of
from effopt.graph.analyses.factors import (
    Axes,
    aligned,
    by_letter,
    call_of,
    dtype_of,
    name_of,
    peeled,
    sizes_of,
    told,
)
from effopt.graph.analyses.lockstep import Along, Apply, Same, Series, leaves
from effopt.graph.constants import constant_number
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import is_floating, shape_of

_aten = torch.ops.aten
# Pointwise, and torch 2.13 does not say so.
_UNTAGGED = (
    _aten.log_sigmoid.default,
    _aten.hardswish.default,
    _aten.where.ScalarOther,
    _aten.where.ScalarSelf,
)
_OUTER = (_aten.outer.default, _aten.ger.default)
_MATMULS = (_aten.matmul.default, _aten.bmm.default, _aten.mm.default)


@dataclass(frozen=True)
class Timed:
    """A value of one step or of all, and which axis each of its dimensions is; `t` is time."""

    value: Any
    """A node, which holds all steps; or a call of each step; or a number."""
    axes: Axes
    dtype: torch.dtype | None = None
    """That in the loop, which may be wider than that of `value`; None: a number."""

    @property
    def letters(self) -> frozenset[str]:
        """The axes that it has."""
        return frozenset(axis for axis in self.axes if axis is not None)

    @property
    def is_of_time(self) -> bool:
        """Whether it differs between steps."""
        of_each = isinstance(self.value, Apply) and any(isinstance(x, Along) for x in leaves(self.value))
        return of_each or "t" in self.letters

    def __str__(self) -> str:
        return f"{name_of(self.value)} by {told(self.axes)}"


def timed(value: Any, axes: Axes) -> Timed:
    """A value without what only lays it out."""
    is_number = isinstance(value, Same) and not isinstance(value.node, Node)
    if is_number or not isinstance(value, Series | Node):
        return Timed(value.node if is_number else value, ())
    return Timed(*peeled(value, axes), dtype_of(value))


def operands_of(whole: Timed, given: Any) -> Timed:
    """An operand of a pointwise call."""
    is_value = isinstance(given, Series | Node)
    return timed(given, aligned(whole.axes, given, whole.value) if is_value else ())


def factors_of(product: Timed, apart: frozenset[str], where: Node) -> Iterator[Timed]:
    """What a product is of, down to values that have not all the axes of `apart`. Raises `Reject`."""
    if not apart <= product.letters:
        yield product
        return
    call = call_of(product.value)
    given: list[Timed] | None = None
    if call is not None and call[0] in (_aten.mul.Tensor, _aten.mul.Scalar):
        given = [operands_of(product, x) for x in call[1][:2]]
    elif call is not None and call[0] is _aten.einsum.default:
        given = _of_einsum(product, *call[1][:2])
    elif call is not None and call[0] in _OUTER:
        given = [timed(x, (axis,)) for x, axis in zip(call[1][:2], product.axes, strict=True)]
    elif call is not None and call[0] in _MATMULS:
        given = _of_matmul(product, *call[1][:2])
    elif call is not None and call[0] is _aten.div.Tensor:
        given = _of_quotient(product, *call[1][:2])
    if call is not None and call[0] is _aten._to_copy.default:
        raise Reject(f"what it adds is rounded to {dtype_of(product.value)}", where)
    words = f"what it adds, {product}, is no product of a key and a value"
    if call is not None and call[0] in _MATMULS:
        words += ", but of matrices: in a loop over chunks, take single tokens, or all of them at once"
    elif call is not None and call[0] is _aten.div.Tensor:
        words += ", but a quotient: divide the key or the value"
    require(given is not None, words, where)
    for factor in given or ():
        yield from factors_of(factor, apart, where)


def _of_einsum(product: Timed, equation: str, operands: Any) -> list[Timed] | None:
    letters = letters_of(equation)
    if letters is None or any(set(word) - set(letters[1]) for word in letters[0]):
        return None
    known = dict(zip(letters[1], zip(product.axes, sizes_of(product.value), strict=True), strict=True))
    return [timed(x, by_letter(x, word, known)) for x, word in zip(operands, letters[0], strict=True)]


def _of_matmul(product: Timed, left: Any, right: Any) -> list[Timed] | None:
    """A column times a row."""
    sizes = (sizes_of(left), sizes_of(right))
    if any(len(size) < 2 for size in sizes) or not statically_known_true(sizes[0][-1] == 1):
        return None
    axes = product.axes
    given = ((left, (*axes[:-1], None)), (right, (*axes[:-2], None, axes[-1])))
    return [timed(x, wide[len(wide) - len(size) :]) for (x, wide), size in zip(given, sizes, strict=True)]


def _of_quotient(product: Timed, above: Any, below: Any) -> list[Timed] | None:
    """What is divided, and the inverse of the rest: in float32 or wider, for in 16 bits that may overflow."""
    number = constant_number(below)
    if number:
        return [operands_of(product, above), Timed(1 / number, ())]
    below = below.node if isinstance(below, Same) else below
    nodes = below.nodes if isinstance(below, Apply) else (below,)
    is_wide = isinstance(nodes[0], Node) and dtype_of(below) in (torch.float32, torch.float64)
    if not is_wide:
        return None
    inverse = Apply(_aten.reciprocal.default, (below,), {}, nodes)
    return [operands_of(product, above), operands_of(product, inverse)]


@dataclass(frozen=True)
class Taken:
    """A part of an axis that is nobody's, in each step."""

    inner: Timed
    hidden: str
    """The letter of that axis in `inner`."""
    becomes: str | None
    """The axis that the part is; None: one place of it was taken."""


def taken(found: Timed) -> Taken | None:
    """What `found` takes a part of, if that is all it does."""
    call = call_of(found.value)
    if call is None or call[0] not in (_aten.select.int, _aten.slice.Tensor):
        return None
    source, dim = call[1][:2]
    dim, is_slice = dim % len(sizes_of(source)), call[0] is _aten.slice.Tensor
    hidden = "#" + max((axis for axis in found.axes if axis is not None and "#" in axis), default="")
    inner = timed(source, (*found.axes[:dim], hidden, *found.axes[dim + is_slice :]))
    return Taken(inner, hidden, found.axes[dim] if is_slice else None)


def is_pointwise(target: Any) -> bool:
    """Whether an element of a call's result is made of those at its place, and nothing is random."""
    tags = getattr(target, "tags", ())
    is_random = torch.Tag.nondeterministic_seeded in tags
    return (torch.Tag.pointwise in tags and not is_random) or target in _UNTAGGED


def require_timed(found: Timed, sizes: Mapping[str, Any], where: Node) -> None:
    """That a value can be computed of all steps at once, with these sizes. Raises `Reject`."""
    if isinstance(found.value, Node):
        require(is_floating(found.value), f"{found.value.name} is no floating-point tensor", where)
        for axis, size in zip(found.axes, shape_of(found.value), strict=True):
            wanted = 1 if axis is None else sizes.get(axis, size)
            fits = statically_known_true(size == wanted) or statically_known_true(size == 1)
            words = f"{found.value.name} has {size} of {wanted} along {axis}: the state is broadcast"
            require(fits, words, where)
    elif isinstance(found.value, Apply):
        target = found.value.target
        words = f"{name_of(found.value)}, {target}, is computed in each step: compute it before the loop"
        is_plain = not any(isinstance(value, (list, tuple)) for value in _arguments_of(found.value))
        require(taken(found) is not None or (is_pointwise(target) and is_plain), words, where)
        for below in _below(found):
            require_timed(below, sizes, where)
    else:
        require(not isinstance(found.value, Series), f"{found} is no tensor of all steps", where)


def nodes_of(found: Timed) -> Iterator[Node]:
    """The tensors that a value is made of."""
    if isinstance(found.value, Node):
        yield found.value
    elif isinstance(found.value, Apply):
        for below in _below(found):
            yield from nodes_of(below)


def _below(found: Timed) -> list[Timed]:
    part = taken(found)
    given = [x for x in _arguments_of(found.value) if isinstance(x, Series | Node)]
    return [operands_of(found, x) for x in given] if part is None else [part.inner]


def _arguments_of(call: Apply) -> tuple[Any, ...]:
    """By position and by name."""
    return (*call.args, *call.kwargs.values())


def number_of(found: Timed) -> float | None:
    """The number that a value is in every step; None if it is none."""
    return constant_number(found.value) if not isinstance(found.value, Apply) else None
