"""A linear recurrence as the selective scan that it is, and writing the scan.

    state [b, d, n];  decay = exp(delta * a);  added = delta * u * b;  read-out = sum over n of c * state

`analyses.factors` tells of which axes every factor is; that is how they are known here. `read` only looks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.analyses.factors import (
    Axes,
    Operand,
    aligned,
    by_letter,
    call_of,
    factors,
    letters_of,
    name_of,
    order_of,
    peeled,
    sizes_of,
    told,
    widens,
)
from effopt.graph.analyses.lockstep import Along, Apply, Series, State, leaves
from effopt.graph.analyses.no_ops import COPIES
from effopt.graph.analyses.recurrences import Recurrence
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten
_STATE: Axes = ("b", "d", "n")
_SEQUENCE, _RATES, _PROJECTION = ("b", "d", "t"), ("d", "n"), ("b", "n", "t")
_WHOLE = tuple(map(frozenset, (_SEQUENCE, _RATES, _PROJECTION)))
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)


@dataclass(frozen=True)
class Scan:
    """The operands of `effopt::selective_scan`."""

    u: Operand
    delta: Operand
    a: Operand
    b: Operand
    c: Operand
    y: Axes
    """The axes of the collected read-outs."""
    backwards: bool
    """Whether the first step reads the last position."""


def read(found: Recurrence) -> Scan:
    """What a recurrence scans. Raises `Reject`."""
    require(
        len(found.outputs) == 1, f"its states are read in {len(found.outputs)} ways, not in one", found.last
    )
    (output,) = found.outputs
    decay = found.decay
    require(decay is not None, "nothing decays its state", found.last)
    assert decay is not None
    rank = len(shape_of(found.last))
    require(rank == 3, f"its state has {rank} dimensions, not batch, channel and state", found.last)
    backwards = _direction(found, [decay, found.added, output.series])
    a, delta = _rates(decay, found.last)
    u, b = _inputs(found.added, delta, found.last)
    axes, c = _readout(output.series, found.last)
    _require_unrounded(output.series, val(output.collected.node).dtype, found.last)
    at = output.collected.axis
    require(c is not None, "its read-out is not a sum over the state", found.last)
    if output.collected.keeps_axis:
        require(axes[at] is None, "its read-outs are joined along an axis of theirs", output.collected.node)
        axes = (*axes[:at], *axes[at + 1 :])
    axes = (*axes[:at], "t", *axes[at:])
    is_known = sorted(map(str, axes)) == sorted(_SEQUENCE)
    require(is_known, f"its outputs have axes {told(axes)}", output.collected.node)
    assert c is not None
    _require_operands(found, (u, delta, a, b, c, Operand(output.collected.node, axes)))
    return Scan(u, delta, a, b, c, axes, backwards)


def _require_operands(found: Recurrence, operands: Sequence[Operand]) -> None:
    """Each is floating-point, and as long along each axis as the state is: nothing is broadcast."""
    sizes: dict[Any, Any] = dict(zip(_STATE, shape_of(found.last), strict=True)) | {"t": found.steps}
    for operand in operands:
        name = operand.node.name
        require(is_floating(operand.node), f"{name} is not a real floating-point tensor", found.last)
        for axis, size in zip(operand.axes, shape_of(operand.node), strict=True):
            words = f"{name} has {size} of {sizes[axis]} along {axis}: it is broadcast"
            require(statically_known_true(size == sizes[axis]), words, found.last)


def covered(found: Recurrence) -> tuple[Node, ...]:
    """Every call that a scan takes the place of: the loop, and the products that its steps read parts of."""
    try:
        scan = read(found)
    except Exception:  # noqa: BLE001 - whoever rewrites reads it too, and tells why it cannot be
        return found.nodes
    operands = {operand.node for operand in (scan.u, scan.delta, scan.a, scan.b, scan.c)}
    nodes, waiting = set(found.nodes), list(found.sources)
    while waiting:
        node = waiting.pop()
        if node not in nodes and node not in operands and node.op == "call_function":
            nodes.add(node)
            waiting.extend(node.all_input_nodes)
    return tuple(sorted(nodes))


def write(emit: Emit, found: Recurrence, scan: Scan) -> tuple[Node, Node]:
    """Emit the scan: what was collected, and the last state, in the dtypes and layouts that they had."""
    collected, output = found.outputs[0].collected.node, found.outputs[0]
    wanted, state = val(collected).dtype, val(found.last).dtype
    operands = [(scan.u, _SEQUENCE), (scan.delta, _SEQUENCE), (scan.a, _RATES), (scan.b, _PROJECTION),
                (scan.c, _PROJECTION)]  # fmt: skip
    given = [_arranged(emit, operand, order, scan.backwards) for operand, order in operands]
    dtype = torch.promote_types(val(given[0]).dtype, wanted)
    # The op computes in the dtype of `u`, or float32: a wider state is scanned as wide as it was.
    given[0] = _cast(emit, given[0], state if state == torch.float64 else dtype)
    result = emit(ops.selective_scan, *given, *(() if found.start is None else (found.start,)))
    y = _cast(emit, emit(operator.getitem, result, 0), wanted)
    last = _cast(emit, emit(operator.getitem, result, 1), state)
    y = emit(_aten.flip.default, y, [2]) if output.reverse else y
    y = _permuted(emit, y, _SEQUENCE, scan.y)
    if val(y).stride() != val(collected).stride():
        y = emit(_aten.contiguous.default, y)
    return y, last


def _direction(found: Recurrence, series: Sequence[Series]) -> bool:
    """Whether steps go backwards, of all positions of every tensor. Raises `Reject`."""
    parts = [leaf for each in series for leaf in leaves(each) if isinstance(leaf, Along)]
    backwards = parts[0].stride < 0
    for part in parts:
        size = shape_of(part.base)[part.axis]
        whole = statically_known_true(size == found.steps) and part.first == (found.steps - 1) * backwards
        words = f"its steps read {found.steps} of the {size} places of {part.base.name}, from {part.first}"
        require(whole and (part.stride < 0) == backwards, words, part.base)
    return backwards


def _rates(decay: Series, where: Node) -> tuple[Operand, Operand]:
    """`a` and `delta` of `exp(delta * a)`."""
    value, axes = peeled(decay, aligned(_STATE, decay, where))
    call = call_of(value)
    require(call is not None and call[0] is _aten.exp.default, "its decay is not an exponential", where)
    assert call is not None
    found = factors(call[1][0], axes, _WHOLE, where)
    kinds = sorted(tuple(sorted(map(str, f.axes))) for f in found)
    words = ", ".join(f"{f.node.name} by {told(f.axes)}" for f in found)
    fits = kinds == sorted([_SEQUENCE, _RATES])
    require(
        fits, f"its decay is exp of {words}; expected a step length by (b, d, t) and a rate by (d, n)", where
    )
    return (found[0], found[1]) if len(found[0].axes) == 2 else (found[1], found[0])


def _inputs(added: Series, delta: Operand, where: Node) -> tuple[Operand, Operand]:
    """`u` and `b` of `delta * u * b`."""
    found = factors(added, aligned(_STATE, added, where), _WHOLE, where)
    of_input = [f for f in found if set(f.axes) == set(_SEQUENCE)]
    rest = [f for f in found if f not in of_input]
    if len(of_input) == 1 and of_input[0] != delta:
        of_input = _product(of_input[0])
    words = ", ".join(f"{f.node.name} by {told(f.axes)}" for f in (*of_input, *rest))
    require(delta in of_input, f"the step length of its decay is not in what it adds: {words}", where)
    of_input.remove(delta)
    fits = len(of_input) == 1 and [set(f.axes) for f in rest] == [set(_PROJECTION)]
    require(fits, f"what it adds is {words}; expected an input by (b, d, t) and b by (b, n, t)", where)
    return of_input[0], rest[0]


def _product(operand: Operand) -> list[Operand]:
    """The two factors of an operand that is a product, if both have all its axes."""
    call = call_of(operand.node)
    if call is None or call[0] is not _aten.mul.Tensor or not all(isinstance(x, Node) for x in call[1]):
        return [operand]
    factors = [peeled(x, aligned(operand.axes, x, operand.node)) for x in call[1]]
    made = [Operand(node, axes) for node, axes in factors if isinstance(node, Node)]
    return made if len(made) == 2 and all(None not in f.axes for f in made) else [operand]


def _readout(series: Any, where: Node) -> tuple[Axes, Operand | None]:
    """The axes of what is made of a state, and what it was multiplied by and summed over `n` with."""
    if isinstance(series, State):
        return _STATE, None
    call = call_of(series)
    require(call is not None, f"its read-out holds {name_of(series)}", where)
    assert call is not None
    target, args = call
    if target in _PRODUCTS:
        return _matrix_product(args, where)
    if target is _aten.sum.dim_IntList:
        return _sum(args, where)
    if target is _aten.einsum.default:
        return _einsum(args[0], args[1], where)
    axes, c = _readout(args[0], where)
    if target in (_aten._to_copy.default, *COPIES):
        return axes, c
    if target in (_aten.select.int, _aten.squeeze.dim):
        dim = args[1] % len(axes)
        require(axes[dim] is None, f"its read-out takes a part of {axes[dim]}", where)
        return (*axes[:dim], *axes[dim + 1 :]), c
    if target is _aten.unsqueeze.default:
        dim = args[1] % (len(axes) + 1)
        return (*axes[:dim], None, *axes[dim:]), c
    order = order_of(target, args, len(axes))
    require(order is not None, f"its read-out goes through {target}", where)
    assert order is not None
    return tuple(axes[i] for i in order), c


def _require_unrounded(series: Series, kept: torch.dtype, where: Node) -> None:
    """No cast of a state, or of what is made of it, loses more than the dtype of what is collected does."""
    if not isinstance(series, Apply):
        return
    if series.target is _aten._to_copy.default:
        cast = series.nodes[0]
        fits = widens(cast, cast.args[0]) or (val(cast).dtype == kept and kept.is_floating_point)
        require(fits, f"its read-out is rounded to {val(cast).dtype}", where)
    for value in call_of(series)[1]:  # type: ignore[index]
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if _reads_state(item):
                _require_unrounded(item, kept, where)


def _matrix_product(args: Sequence[Any], where: Node) -> tuple[Axes, Operand | None]:
    has_state = [_reads_state(x) for x in args[:2]]
    require(has_state.count(True) == 1, "its read-out multiplies states", where)
    at = has_state.index(True)
    axes, c = _readout(args[at], where)
    is_batch = c is None and len(axes) == 3 and axes[0] == "b"
    require(is_batch, f"its read-out multiplies {told(axes)} as a matrix", where)
    summed, kept = (axes[2], axes[1]) if at == 0 else (axes[1], axes[2])
    sizes = sizes_of(args[1 - at])
    is_sum = summed == "n" and len(sizes) == 3 and statically_known_true(sizes[2 - at] == 1)
    require(is_sum, f"its read-out is a product over {summed}, not one sum over n", where)
    wanted: Axes = ("b", "n", None) if at == 0 else ("b", None, "n")
    read = _operand(args[1 - at], wanted, where)
    return (("b", kept, None) if at == 0 else ("b", None, kept)), read


def _sum(args: Sequence[Any], where: Node) -> tuple[Axes, Operand | None]:
    summand, dims, keep, dtype = args
    require(dtype is None, f"its read-out sums in {dtype}", where)
    call = call_of(summand)
    require(call is not None and call[0] is _aten.mul.Tensor, "its read-out sums something else", where)
    assert call is not None
    has_state = [_reads_state(x) for x in call[1]]
    require(has_state.count(True) == 1, "its read-out multiplies states", where)
    at = has_state.index(True)
    axes, c = _readout(call[1][at], where)
    own, made = _sizes(call[1][at], where), sizes_of(summand)
    is_own = len(own) == len(made) and all(map(statically_known_true, map(operator.eq, own, made)))
    require(is_own, f"its read-out broadcasts its state, {list(own)}, to {list(made)}", where)
    dim = axes.index("n") if "n" in axes else -1
    is_sum = c is None and [d % len(axes) for d in dims or ()] == [dim]
    require(is_sum, f"its read-out sums over {dims}, not over n", where)
    read = _operand(call[1][1 - at], aligned(axes, call[1][1 - at], summand), where)
    return (*axes[:dim], *([None] if keep else []), *axes[dim + 1 :]), read


def _einsum(equation: str, operands: Sequence[Any], where: Node) -> tuple[Axes, Operand | None]:
    has_state = [_reads_state(x) for x in operands]
    words = letters_of(equation)
    require(
        words is not None and has_state in ([True, False], [False, True]),
        f"its read-out is {equation}",
        where,
    )
    assert words is not None
    at = has_state.index(True)
    axes, c = _readout(operands[at], where)
    known = dict(zip(words[0][at], zip(axes, _sizes(operands[at], where), strict=True), strict=True))
    other = words[0][1 - at]
    summed = [known[x][0] for x in known if x not in words[1]]
    is_sum = c is None and summed == ["n"] and not set(other) - set(known)
    require(is_sum, f"its read-out is {equation}, not one sum over n", where)
    read = _operand(operands[1 - at], by_letter(operands[1 - at], other, known), where)
    return tuple(known[x][0] for x in words[1]), read


def _sizes(value: Any, where: Node) -> tuple[Any, ...]:
    return shape_of(where) if isinstance(value, State) else sizes_of(value)


def _reads_state(value: Any) -> bool:
    return isinstance(value, Series) and any(isinstance(leaf, State) for leaf in leaves(value))


def _operand(value: Any, axes: Axes, where: Node) -> Operand:
    value, axes = peeled(value, axes)
    known = isinstance(value, Node) and None not in axes and set(axes) == set(_PROJECTION)
    require(known, f"its read-out is with {name_of(value)} by {told(axes)}, not by (b, n, t)", where)
    return Operand(value, axes)


def _arranged(emit: Emit, operand: Operand, axes: Axes, backwards: bool) -> Node:
    """An operand with its axes in this order, the first step first."""
    node = _permuted(emit, operand.node, operand.axes, axes)
    return emit(_aten.flip.default, node, [2]) if backwards and "t" in axes else node


def _permuted(emit: Emit, node: Node, axes: Axes, wanted: Axes) -> Node:
    order = [axes.index(axis) for axis in wanted]
    return node if order == list(range(len(axes))) else emit(_aten.permute.default, node, order)


def _cast(emit: Emit, node: Node, dtype: torch.dtype) -> Node:
    return node if val(node).dtype == dtype else emit(_aten._to_copy.default, node, dtype=dtype)
