"""A linear recurrence as the linear attention that it is, and writing the op.

    state [b, h, d, dv] or [b, h, dv, d];  added = key * value;  read-out = sum over d of query * state

The last two axes of a state are `m` and `n`, whichever of them is summed over is the key's channel. A state
of fewer dimensions has no batch entries, or no heads. `read` only looks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.analyses.factors import Axes, aligned, told
from effopt.graph.analyses.lockstep import is_backwards
from effopt.graph.analyses.loop_decay import Factor, Kind, decay_of
from effopt.graph.analyses.over_time import Timed, factors_of, nodes_of, number_of, require_timed, timed
from effopt.graph.analyses.readouts import collected_axes, read_out, require_unrounded
from effopt.graph.analyses.recurrences import Recurrence
from effopt.graph.layouts import laid_out_as, require_dense
from effopt.graph.rewrite import Emit, require
from effopt.graph.steps import Steps
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_CHANNELS = frozenset("mn")
_LEADS = {4: ("b", "h"), 3: ("h",), 2: ()}


@dataclass(frozen=True)
class RecurrentForm:
    """The operands of `effopt::linear_attention`: what each is a product of."""

    query: Timed
    keys: tuple[Timed, ...]
    values: tuple[Timed, ...]
    decay: tuple[Factor, ...]
    number: float
    """What every value is multiplied by."""
    scale: float
    channel: str
    """The key's: `m` or `n`."""
    out: Axes
    """The axes of the collected read-outs."""
    backwards: bool

    @property
    def operands(self) -> tuple[Timed, ...]:
        """All of them."""
        return (self.query, *self.keys, *self.values, *(factor.of for factor in self.decay))

    @property
    def value_channel(self) -> str:
        """The other of `m` and `n`."""
        return "n" if self.channel == "m" else "m"


def read(found: Recurrence) -> RecurrentForm:
    """The linear attention that a recurrence computes. Raises `Reject`."""
    last = found.last
    rank = len(shape_of(last))
    require(rank in _LEADS, f"its state has {rank} dimensions, at most 4 are known", last)
    state: Axes = (*_LEADS[rank], "m", "n")
    decay = None if found.decay is None else timed(found.decay, aligned(state, found.decay, last))
    # That is what a selective scan looks like, and its pass tells why it is none.
    require(decay is None or rank != 3 or not decay.letters >= _CHANNELS, "", last)
    count = len(found.outputs)
    require(count == 1, f"its states are read in {count} ways, not in one", last)
    (output,) = found.outputs
    seen = read_out(output.series, state, last)
    require_unrounded(output.series, val(output.collected.node).dtype, last)
    over = seen.over
    words = f"its read-out sums over {over}, and a query is summed with a channel of the state"
    require(over in _CHANNELS, words, last)
    assert over is not None
    query = timed(seen.weight, seen.weight_axes)
    out = collected_axes(output.collected, seen.axes)
    wanted = (set(state) - {over}) | {"t"}
    require(set(out) - {None} == wanted and len(out) == rank, f"its outputs have axes {told(out)}", last)
    keys, values, number = _inputs(timed(found.added, aligned(state, found.added, last)), over, last)
    kept = () if decay is None else tuple(decay_of(decay, last))
    series = [x for x in (found.decay, found.added, output.series) if x is not None]
    backwards = is_backwards(series, found.steps)
    form = RecurrentForm(query, keys, values, kept, number, seen.scale, over, out, backwards)
    _require_operands(form, found)
    return form


def _inputs(added: Timed, channel: str, where: Node) -> tuple[tuple[Timed, ...], tuple[Timed, ...], float]:
    """Factors of the key, of the value, and a number, of what a step adds."""
    keys: list[Timed] = []
    values: list[Timed] = []
    number = 1.0
    for factor in factors_of(added, _CHANNELS, where):
        known = None if factor.letters else number_of(factor)
        if known is not None:
            number *= known
        else:
            (keys if channel in factor.letters else values).append(factor)
    other = _CHANNELS - {channel}
    both = bool(keys) and any(other <= factor.letters for factor in values)
    words = ", ".join(map(str, (*keys, *values)))
    require(both, f"what it adds is {words}, no product of a key and a value", where)
    return tuple(keys), tuple(values), number


def _require_operands(form: RecurrentForm, found: Recurrence) -> None:
    where, sizes = found.last, _sizes(found)
    require_dense(found.outputs[0].collected.node)
    require_dense(found.last)
    other = form.value_channel
    require(other not in form.query.letters, f"its query, {form.query}, has the channel of the value", where)
    has_query = form.channel in form.query.letters or statically_known_true(sizes[form.channel] == 1)
    require(has_query, f"its query, {form.query}, is one number for all channels", where)
    for factor in form.decay:
        words = f"its decay, {factor.of}, differs between channels of the value: a gate is of tokens or keys"
        require(other not in factor.of.letters, words, where)
    for operand in form.operands:
        require_timed(operand, sizes, where)


def _sizes(found: Recurrence) -> dict[str, Any]:
    """The size of each axis."""
    shape = shape_of(found.last)
    named = dict(zip((*_LEADS[len(shape)], "m", "n"), shape, strict=True))
    return {"b": 1, "h": 1, "t": found.steps} | named


def covered(found: Recurrence) -> tuple[Node, ...]:
    """Every call that the op takes the place of: the loop, and what its steps read parts of."""
    try:
        form = read(found)
    except Exception:  # noqa: BLE001 - whoever rewrites reads it too, and tells why it cannot be
        return found.nodes
    return found.down_to({node for operand in form.operands for node in nodes_of(operand)})


def write(emit: Emit, found: Recurrence, form: RecurrentForm) -> tuple[Node, Node]:
    """Emit the op: what was collected, and the last state, in the dtypes and layouts that they had."""
    collected, output = found.outputs[0].collected.node, found.outputs[0]
    wanted, held = val(collected).dtype, val(found.last).dtype
    steps = Steps(emit, _sizes(found), form.backwards)
    rows, columns = ("b", "h", "t", form.channel), ("b", "h", "t", form.value_channel)
    given = [
        steps.product([form.query], rows),
        steps.product(form.keys, rows),
        steps.product(form.values, columns),
    ]
    if form.number != 1.0:
        given[2] = emit(_aten.mul.Tensor, given[2], form.number)
    dtype = wanted
    for node in given:
        dtype = torch.promote_types(dtype, val(node).dtype)
    # The op computes in the dtype of the query, or float32: a wider state is kept as wide as it was.
    dtype = held if held == torch.float64 else dtype
    wide = torch.promote_types(dtype, torch.float32)
    more: dict[str, Node] = {}
    if form.decay:
        more["decay"] = _decay(emit, steps, form, given[0], wide)
    if found.start is not None:
        more["state"] = _start(emit, found.start, form, wide)
    elif any(factor.kind not in (Kind.NUMBER, Kind.CONSTANT) for factor in form.decay):
        # A gate of the first token that is NaN or infinite spoils zeros: 0 * NaN is NaN.
        sizes = [steps.sizes[axis] for axis in ("b", "h", form.channel, form.value_channel)]
        more["state"] = emit(_aten.new_zeros.default, given[0], sizes, dtype=wide)
    given = [emit.cast(node, dtype) for node in given]
    both = emit(ops.linear_attention, *given, scale=form.scale, **more)
    y = emit.cast(emit(operator.getitem, both, 0), wanted)
    y = emit(_aten.flip.default, y, [2]) if output.reverse else y
    last = emit.cast(emit(operator.getitem, both, 1), held)
    for _ in range(4 - len(shape_of(found.last))):
        y, last = (emit(_aten.squeeze.dim, x, 0) for x in (y, last))
    axes = columns[4 - len(form.out) :]
    y = _like(emit, y, [axes.index(str(axis)) for axis in form.out], collected)
    order = list(range(len(form.out)))
    order = [*order[:-2], order[-1], order[-2]] if form.channel == "n" else order
    return y, _like(emit, last, order, found.last)


def _decay(emit: Emit, steps: Steps, form: RecurrentForm, query: Node, wide: torch.dtype) -> Node:
    """The sum of all logarithms: `[h]`, `[b, h, t]` or `[b, h, t, d]`."""
    letters = frozenset[str]().union(*(factor.of.letters for factor in form.decay))
    axes: tuple[str, ...] = ("h",)
    if letters & {"b", "t", form.channel}:
        axes = ("b", "h", "t", *([form.channel] if form.channel in letters else []))
    numbers = [f.by * math.log(f.of.value) for f in form.decay if f.kind is Kind.NUMBER]
    total = None
    for factor in form.decay:
        if factor.kind is not Kind.NUMBER:
            one = _logarithm(emit, factor, steps.laid_out(factor.of, axes), wide)
            total = one if total is None else emit(_aten.add.Tensor, total, one)
    if total is None:
        return emit(_aten.new_full.default, query, [steps.sizes["h"]], sum(numbers), dtype=wide)
    total = emit(_aten.add.Tensor, total, sum(numbers)) if numbers else total
    return steps.expanded(total, axes)


def _logarithm(emit: Emit, factor: Factor, of: Node, wide: torch.dtype) -> Node:
    of = emit.cast(of, wide)
    if factor.kind is Kind.CONSTANT:
        of = emit(_aten.log.default, of)
    elif factor.kind is not Kind.EXPONENT:
        of = emit(_aten.neg.default, of) if factor.kind is Kind.REST_OF_SIGMOID else of
        of = emit(_aten.log_sigmoid.default, of)
    return of if factor.by == 1.0 else emit(_aten.mul.Tensor, of, factor.by)


def _start(emit: Emit, start: Node, form: RecurrentForm, wide: torch.dtype) -> Node:
    """The given state, `[b, h, d, dv]`."""
    start = emit(_aten.transpose.int, start, -2, -1) if form.channel == "n" else start
    for _ in range(4 - len(shape_of(start))):
        start = emit(_aten.unsqueeze.default, start, 0)
    return emit.cast(start, wide)


def _like(emit: Emit, node: Node, order: Sequence[int], old: Node) -> Node:
    """Turned, and laid out as what it takes the place of."""
    node = node if list(order) == sorted(order) else emit(_aten.permute.default, node, list(order))
    return laid_out_as(emit, node, old)
