"""Of which axes the factors of a loop's operands are.

Follows each axis of a state, and that of time, down through transposes and axes of size 1, whether a model
forms products of all steps at once or in each step. Looks only; symbolic sizes are compared without guards.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.einsum_letters import letters_of
from effopt.graph.analyses.heads import VIEWS
from effopt.graph.analyses.lockstep import Along, Apply, Same, Series
from effopt.graph.analyses.no_ops import COPIES, stands_for
from effopt.graph.matching import bound_arguments
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
Axes = tuple[str | None, ...]
"""What each dimension of a value is, by a letter; `t` is time; None is one of size 1 that broadcasts."""


@dataclass(frozen=True)
class Operand:
    """A tensor, and which axis each of its dimensions is."""

    node: Node
    axes: Axes


def factors(value: Any, axes: Axes, whole: Collection[frozenset[str]], where: Node) -> list[Operand]:
    """What a product is of, down to tensors that have one of the sets of axes in `whole`. Raises `Reject`."""
    value, axes = peeled(value, axes)
    is_whole = None not in axes and frozenset(axes) in whole
    if isinstance(value, Node) and is_whole:
        return [Operand(value, axes)]
    product = _product_of(value, axes)
    require(product is not None, f"{name_of(value)} by {told(axes)} is no product", where)
    assert product is not None
    for factor, _ in product:
        require(isinstance(factor, Series | Node), f"a number, {factor}, is a factor", where)
    return [f for factor, its in product for f in factors(factor, its, whole, where)]


def _product_of(value: Any, axes: Axes) -> list[tuple[Any, Axes]] | None:
    """The operands of a product, and their axes; None if it is none, or sums."""
    call = call_of(value)
    if call is not None and call[0] is _aten.mul.Tensor:
        both = call[1][:2]
        return [(x, aligned(axes, x, value) if isinstance(x, Series | Node) else ()) for x in both]
    if call is None or call[0] is not _aten.einsum.default:
        return None
    letters = letters_of(call[1][0])
    if letters is None or any(set(x) - set(letters[1]) for x in letters[0]):
        return None
    sizes = dict(zip(letters[1], zip(axes, sizes_of(value), strict=True), strict=True))
    return [(x, by_letter(x, word, sizes)) for x, word in zip(call[1][1], letters[0], strict=True)]


def by_letter(operand: Any, word: str, known: dict[str, tuple[str | None, Any]]) -> Axes:
    """The axes of an operand of `einsum`, of the axis and size that each letter is `known` for."""
    pairs = zip(word, sizes_of(operand), strict=True)
    return tuple(known[x][0] if statically_known_true(known[x][1] == size) else None for x, size in pairs)


def peeled(value: Any, axes: Axes) -> tuple[Any, Axes]:
    """The value below what only lays it out, and its axes."""
    while True:
        if isinstance(value, Same):
            value = value.node
        elif isinstance(value, Along):
            rest = axes[value.axis + value.keeps_axis :]
            value, axes = value.base, (*axes[: value.axis], "t", *rest)
        elif isinstance(value, Node) and (source := stands_for(value)) is not None:
            value = source
        else:
            below = _below(value, axes)
            if below is None:
                return value, axes
            value, axes = below


def _below(value: Any, axes: Axes) -> tuple[Any, Axes] | None:
    call = call_of(value)
    if call is None:
        return None
    target, args = call
    if target is _aten.unsqueeze.default:
        dim = args[1] % len(axes)
        return args[0], (*axes[:dim], *axes[dim + 1 :])
    if target is _aten.squeeze.dim:
        sizes = sizes_of(args[0])
        dim = args[1] % max(len(sizes), 1)
        is_gone = len(sizes) == len(axes) + 1
        return args[0], (*axes[:dim], None, *axes[dim:]) if is_gone else axes
    if target in COPIES or (target is _aten._to_copy.default and widens(value, args[0])):
        return args[0], axes
    if target is _aten.expand.default:
        return args[0], aligned(axes, args[0], value)
    flat = reshaped(target, value, args[0], axes)
    if flat is not None:
        return args[0], flat
    order = order_of(target, args, len(axes))
    if order is None:
        return None
    return args[0], tuple(axes[order.index(i)] for i in range(len(axes)))


def reshaped(target: Any, value: Any, other: Any, axes: Axes) -> Axes | None:
    """The axes of `other`, if it is `value` by these axes but for dimensions of size 1, which have none."""
    if target not in VIEWS:
        return None
    own, sizes = sizes_of(value), sizes_of(other)
    kept = [axis for axis, size in zip(axes, own, strict=True) if not statically_known_true(size == 1)]
    left = [i for i, size in enumerate(sizes) if not statically_known_true(size == 1)]
    wide = [size for size in own if not statically_known_true(size == 1)]
    is_same = len(left) == len(wide) and all(
        statically_known_true(sizes[i] == size) for i, size in zip(left, wide, strict=True)
    )
    by_place = dict(zip(left, kept, strict=True)) if is_same else {}
    return tuple(by_place.get(i) for i in range(len(sizes))) if is_same else None


def order_of(target: Any, args: Sequence[Any], rank: int) -> list[int] | None:
    """Which dimension of its operand each dimension of a turned tensor is; None if it is not turned."""
    order = list(range(rank))
    if target is _aten.permute.default:
        return [d % rank for d in args[1]]
    if target is _aten.transpose.int:
        i, j = args[1] % rank, args[2] % rank
        order[i], order[j] = j, i
        return order
    return order[::-1] if target is _aten.t.default else None


def widens(node: Any, source: Any) -> bool:
    """Whether a cast is of a floating-point dtype to one as fine and as wide, or more so."""
    new, old = dtype_of(node), dtype_of(source)
    if not (new.is_floating_point and old.is_floating_point):
        return False
    wide, narrow = torch.finfo(new), torch.finfo(old)
    return wide.eps <= narrow.eps and wide.max >= narrow.max and wide.tiny <= narrow.tiny


def aligned(axes: Axes, operand: Any, result: Any) -> Axes:
    """The axes of an operand that broadcasts to `result`."""
    sizes, wanted = sizes_of(operand), sizes_of(result)
    kept = axes[len(axes) - len(sizes) :]
    pairs = zip(sizes, wanted[len(wanted) - len(sizes) :], kept, strict=True)
    return tuple(axis if statically_known_true(size == full) else None for size, full, axis in pairs)


def call_of(value: Any) -> tuple[Any, list[Any]] | None:
    """Target and arguments of a call, in one step or in all."""
    if isinstance(value, Apply):
        if value.nodes[0].target != value.target:
            return value.target, list(value.args)
        bound = dict(bound_arguments(value.nodes[0]))
        bound |= dict(zip(bound, value.args, strict=False)) | value.kwargs
        return value.target, list(bound.values())
    if isinstance(value, Node) and value.op == "call_function":
        return value.target, list(bound_arguments(value).values())
    return None


def _first(value: Any) -> Any:
    if isinstance(value, Apply):
        return value.nodes[0]
    return value.node if isinstance(value, Same) else value


def sizes_of(value: Any) -> tuple[Any, ...]:
    """The shape of a tensor, or of a value in each step."""
    if isinstance(value, Along):
        sizes = shape_of(value.base)
        kept = (1,) if value.keeps_axis else ()
        return (*sizes[: value.axis], *kept, *sizes[value.axis + 1 :])
    return shape_of(_first(value))


def dtype_of(value: Any) -> torch.dtype:
    """Of a tensor, or of a value in each step."""
    return val(value.base if isinstance(value, Along) else _first(value)).dtype


def name_of(value: Any) -> str:
    """What reasons call it: the node in the first step, or what all steps read parts of."""
    return getattr(value.base if isinstance(value, Along) else _first(value), "name", str(value))


def told(axes: Axes) -> str:
    """Axes as reasons write them: `(b, 1, d)`."""
    return f"({', '.join(axis or '1' for axis in axes)})"
