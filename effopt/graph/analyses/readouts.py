"""What a loop makes of its state in each step: a sum over one axis, with a weight.

    (h * c[:, None]).sum(-1),   h @ c[..., None],   einsum("bdn,bn->bd", h, c)

Follows the axes of the state, known by letters, up to what is collected. Looks only.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.collected import Collected
from effopt.graph.analyses.einsum_letters import letters_of
from effopt.graph.analyses.factors import (
    Axes,
    aligned,
    by_letter,
    call_of,
    name_of,
    order_of,
    reshaped,
    sizes_of,
    told,
    widens,
)
from effopt.graph.analyses.lockstep import Apply, Series, State, leaves
from effopt.graph.analyses.no_ops import COPIES
from effopt.graph.constants import SCALINGS, constant_number
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default, _aten.mm.default, _aten.mv.default, _aten.dot.default)


@dataclass(frozen=True)
class ReadOut:
    """`scale` times the sum over an axis of a state times `weight`."""

    axes: Axes
    """What each of its dimensions is."""
    over: str | None = None
    """The axis of the sum; None: it is the state itself."""
    weight: Any = None
    weight_axes: Axes = ()
    scale: float = 1.0
    by: tuple[tuple[Any, Axes], ...] = ()
    """What the state is multiplied by ahead of that, and the axes of each."""
    plus: Any = None
    """What is added to it then."""
    plus_axes: Axes = ()


def read_out(series: Any, state: Axes, where: Node) -> ReadOut:
    """What `series` makes of a state with these axes. Raises `Reject`."""
    if isinstance(series, State):
        return ReadOut(state)
    call = call_of(series)
    require(call is not None, f"its read-out holds {name_of(series)}", where)
    assert call is not None
    target, args = call
    if target in _PRODUCTS:
        return _matrix_product(args, state, where)
    if target is _aten.sum.dim_IntList:
        return _sum(args, state, where)
    if target is _aten.einsum.default:
        return _einsum(args[0], args[1], state, where)
    if target in SCALINGS:
        number = constant_number(args[1])
        if not number and target is _aten.mul.Tensor and reads_state(args[0]) != reads_state(args[1]):
            return _scaled(series, args, state, where)
        words = f"its read-out goes through {target}: multiply what is collected, behind the loop"
        require(bool(number), words, where)
        below = read_out(args[0], state, where)
        return replace(below, scale=below.scale * float(number or 1.0) ** SCALINGS[target])
    if target is _aten.add.Tensor and args[2] == 1 and reads_state(args[0]) != reads_state(args[1]):
        return _plus(series, args, state, where)
    below = read_out(args[0], state, where)
    return replace(below, axes=_moved(series, target, args, below.axes, where))


def _scaled(series: Any, args: Sequence[Any], state: Axes, where: Node) -> ReadOut:
    """A state times a tensor."""
    at = _one_state(args, where)
    below, other = read_out(args[at], state, where), args[1 - at]
    fits = below.over is None and below.plus is None and isinstance(other, Series | Node)
    fits = fits and _is_as_large(args[at], series, where)
    require(
        fits, f"its read-out goes through {series.target}: multiply what is collected, behind the loop", where
    )
    return replace(below, by=(*below.by, (other, aligned(below.axes, other, series))))


def _plus(series: Any, args: Sequence[Any], state: Axes, where: Node) -> ReadOut:
    """A state and something more."""
    at = _one_state(args, where)
    below, other = read_out(args[at], state, where), args[1 - at]
    fits = below.over is None and below.plus is None and below.scale == 1
    words = f"its read-out adds {name_of(other)}: add to what is collected, behind the loop"
    require(fits and isinstance(other, Series | Node) and _is_as_large(args[at], series, where), words, where)
    return replace(below, plus=other, plus_axes=aligned(below.axes, other, series))


def _is_as_large(state: Any, made: Any, where: Node) -> bool:
    """Whether what is made of a state has its sizes: nothing broadcasts it."""
    own, sizes = _sizes(state, where), sizes_of(made)
    return len(own) == len(sizes) and all(map(statically_known_true, map(operator.eq, own, sizes)))


def _moved(series: Any, target: Any, args: Sequence[Any], axes: Axes, where: Node) -> Axes:
    """The axes of what only lays a value out anew."""
    if target in (_aten._to_copy.default, *COPIES):
        return axes
    if target in (_aten.select.int, _aten.squeeze.dim):
        dim = args[1] % len(axes)
        require(axes[dim] is None, f"its read-out takes a part of {axes[dim]}", where)
        return (*axes[:dim], *axes[dim + 1 :])
    if target is _aten.unsqueeze.default:
        dim = args[1] % (len(axes) + 1)
        return (*axes[:dim], None, *axes[dim:])
    turned = None if isinstance(args[0], State) else reshaped(target, args[0], series, axes)
    if turned is not None:
        return turned
    order = order_of(target, args, len(axes))
    require(order is not None, f"its read-out goes through {target}: do that behind the loop", where)
    assert order is not None
    return tuple(axes[i] for i in order)


def collected_axes(collected: Collected, axes: Axes) -> Axes:
    """The axes of what holds the read-outs of all steps, of those of one. Raises `Reject`."""
    at = collected.axis
    if collected.keeps_axis:
        require(axes[at] is None, "its read-outs are joined along an axis of theirs", collected.node)
        axes = (*axes[:at], *axes[at + 1 :])
    return (*axes[:at], "t", *axes[at:])


def require_unrounded(series: Series, kept: torch.dtype, where: Node) -> None:
    """No cast of a state, or of what is made of it, loses more than the dtype of what is collected does."""
    if not isinstance(series, Apply):
        return
    if series.target is _aten._to_copy.default:
        cast = series.nodes[0]
        fits = widens(cast, cast.args[0]) or (val(cast).dtype == kept and kept.is_floating_point)
        require(fits, f"its read-out is rounded to {val(cast).dtype}", where)
    for value in call_of(series)[1]:  # type: ignore[index]
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if reads_state(item):
                require_unrounded(item, kept, where)


def reads_state(value: Any) -> bool:
    """Whether a series depends on the state."""
    return isinstance(value, Series) and any(isinstance(leaf, State) for leaf in leaves(value))


def _one_state(args: Sequence[Any], where: Node) -> int:
    """Which of two operands is made of the state."""
    has_state = [reads_state(x) for x in args[:2]]
    require(has_state.count(True) == 1, "its read-out multiplies states", where)
    return has_state.index(True)


def _matrix_product(args: Sequence[Any], state: Axes, where: Node) -> ReadOut:
    at = _one_state(args, where)
    below, other = read_out(args[at], state, where), args[1 - at]
    axes, sizes = below.axes, sizes_of(other)
    lead, last = axes[:-2], axes[-2:] if at == 0 else axes[:-3:-1]
    kept, summed = last if len(axes) > 1 else (None, *axes)
    is_plain = below.over is None and summed is not None and None not in lead
    is_whole = is_plain and set(axes) - {None} == set(state)
    require(is_whole, f"its read-out multiplies {told(axes)} as a matrix", where)
    is_row = len(sizes) == 1 or statically_known_true(sizes[-1 - at] == 1)
    fits = is_row and len(sizes) <= max(len(axes), 2)
    require(fits, f"its read-out is a product over {summed}, not one sum over it", where)
    weight: Axes = (*lead, summed, None) if at == 0 else (*lead, None, summed)
    left: Axes = (*lead, kept, None) if at == 0 else (*lead, None, kept)
    if len(sizes) == 1:
        weight, left = (summed,), (*lead, kept)
    if len(axes) == 1:
        left = left[:0] if len(sizes) == 1 else (None,)
    return replace(below, axes=left, over=summed, weight=other, weight_axes=weight[-len(sizes) :])


def _sum(args: Sequence[Any], state: Axes, where: Node) -> ReadOut:
    summand, dims, keep, dtype = args
    require(dtype is None, f"its read-out sums in {dtype}", where)
    call = call_of(summand)
    require(call is not None and call[0] is _aten.mul.Tensor, "its read-out sums something else", where)
    assert call is not None
    at = _one_state(call[1], where)
    below, other = read_out(call[1][at], state, where), call[1][1 - at]
    axes = below.axes
    own, made = _sizes(call[1][at], where), sizes_of(summand)
    words = f"its read-out broadcasts its state, {list(own)}, to {list(made)}"
    require(_is_as_large(call[1][at], summand, where), words, where)
    places = [d % len(axes) for d in dims or ()]
    over = axes[places[0]] if len(places) == 1 else None
    require(below.over is None and over is not None, f"its read-out sums over {dims}, not one axis", where)
    left = (*axes[: places[0]], *([None] if keep else []), *axes[places[0] + 1 :])
    return replace(below, axes=left, over=over, weight=other, weight_axes=aligned(axes, other, summand))


def _einsum(equation: str, operands: Sequence[Any], state: Axes, where: Node) -> ReadOut:
    has_state = [reads_state(x) for x in operands]
    words = letters_of(equation)
    is_known = words is not None and has_state in ([True, False], [False, True])
    require(is_known, f"its read-out is {equation}", where)
    assert words is not None
    at = has_state.index(True)
    below, other = read_out(operands[at], state, where), operands[1 - at]
    known = dict(zip(words[0][at], zip(below.axes, _sizes(operands[at], where), strict=True), strict=True))
    letters = words[0][1 - at]
    summed = [known[x][0] for x in known if x not in words[1]]
    is_sum = below.over is None and len(summed) == 1 and not set(letters) - set(known)
    require(is_sum, f"its read-out is {equation}, not one sum over an axis of the state", where)
    left = tuple(known[x][0] for x in words[1])
    return replace(
        below, axes=left, over=summed[0], weight=other, weight_axes=by_letter(other, letters, known)
    )


def _sizes(value: Any, where: Node) -> tuple[Any, ...]:
    return shape_of(where) if isinstance(value, State) else sizes_of(value)
