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
    call_of,
    factors,
    name_of,
    peeled,
    told,
)
from effopt.graph.analyses.lockstep import Series, is_backwards
from effopt.graph.analyses.loop_outputs import Output
from effopt.graph.analyses.readouts import collected_axes, read_out, require_unrounded
from effopt.graph.analyses.recurrences import Recurrence
from effopt.graph.layouts import laid_out_as, require_dense
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten
_STATE: Axes = ("b", "d", "n")
_SEQUENCE, _RATES, _PROJECTION = ("b", "d", "t"), ("d", "n"), ("b", "n", "t")
_WHOLE = tuple(map(frozenset, (_SEQUENCE, _RATES, _PROJECTION)))


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
    # Batch, channel and state. What has another is no scan; `recurrent_attention_form` tells of it.
    require(rank == 3, "", found.last)
    require(
        not output.is_before, "each step reads the state before its own update, and not after", found.last
    )
    words = "its first step is another, without decay: start from zeros, in the form of the other steps"
    require(not found.opens, words, found.last)
    backwards = is_backwards([decay, found.added, output.series], found.steps)
    a, delta = _rates(decay, found.last)
    u, b = _inputs(found.added, delta, found.last)
    c, axes = _projection(output, found.last)
    is_known = sorted(map(str, axes)) == sorted(_SEQUENCE)
    require(is_known, f"its outputs have axes {told(axes)}", output.collected.node)
    _require_operands(found, (u, delta, a, b, c, Operand(output.collected.node, axes)))
    require_dense(output.collected.node)
    require_dense(found.last)
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
    return found.down_to({operand.node for operand in (scan.u, scan.delta, scan.a, scan.b, scan.c)})


def write(emit: Emit, found: Recurrence, scan: Scan) -> tuple[Node, Node]:
    """Emit the scan: what was collected, and the last state, in the dtypes and layouts that they had."""
    collected, output = found.outputs[0].collected.node, found.outputs[0]
    wanted, state = val(collected).dtype, val(found.last).dtype
    operands = [(scan.u, _SEQUENCE), (scan.delta, _SEQUENCE), (scan.a, _RATES), (scan.b, _PROJECTION),
                (scan.c, _PROJECTION)]  # fmt: skip
    given = [_arranged(emit, operand, order, scan.backwards) for operand, order in operands]
    dtype = torch.promote_types(val(given[0]).dtype, wanted)
    # The op computes in the dtype of `u`, or float32: a wider state is scanned as wide as it was.
    given[0] = emit.cast(given[0], state if state == torch.float64 else dtype)
    result = emit(ops.selective_scan, *given, *(() if found.start is None else (found.start,)))
    y = emit.cast(emit(operator.getitem, result, 0), wanted)
    last = emit.cast(emit(operator.getitem, result, 1), state)
    y = emit(_aten.flip.default, y, [2]) if output.reverse else y
    y = _permuted(emit, y, _SEQUENCE, scan.y)
    return laid_out_as(emit, y, collected), laid_out_as(emit, last, found.last)


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


def _projection(output: Output, where: Node) -> tuple[Operand, Axes]:
    """`c`, with which a read-out sums over `n`, and the axes of what is collected."""
    seen = read_out(output.series, _STATE, where)
    require_unrounded(output.series, val(output.collected.node).dtype, where)
    require(seen.over is not None, "its read-out is not a sum over the state", where)
    require(seen.over == "n", f"its read-out sums over {seen.over}, not over n", where)
    is_plain = seen.plus is None and not seen.by
    require(is_plain, "its read-out adds to the state, or multiplies it, ahead of its sum", where)
    require(seen.scale == 1.0, f"its read-out is scaled by {seen.scale} in each step", where)
    value, axes = peeled(seen.weight, seen.weight_axes)
    known = isinstance(value, Node) and None not in axes and set(axes) == set(_PROJECTION)
    require(known, f"its read-out is with {name_of(value)} by {told(axes)}, not by (b, n, t)", where)
    return Operand(value, axes), collected_axes(output.collected, seen.axes)


def _arranged(emit: Emit, operand: Operand, axes: Axes, backwards: bool) -> Node:
    """An operand with its axes in this order, the first step first."""
    node = _permuted(emit, operand.node, operand.axes, axes)
    return emit(_aten.flip.default, node, [2]) if backwards and "t" in axes else node


def _permuted(emit: Emit, node: Node, axes: Axes, wanted: Axes) -> Node:
    order = [axes.index(axis) for axis in wanted]
    return node if order == list(range(len(axes))) else emit(_aten.permute.default, node, order)
