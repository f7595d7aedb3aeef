"""A linear recurrence as the linear attention that it is.

    state [b, h, d, dv] or [b, h, dv, d];  added = key * value;  read-out = sum over d of query * state
    state [b, h, d], a normaliser's;       added = key;          read-out = sum over d of query * state

The last two axes of a state are `m` and `n`, whichever of them is summed over is the key's channel. A state
that is a vector for each head has `m` alone: its values are ones. A state of fewer dimensions has no batch
entries, or no heads. Looks only; `recurrent_attention_call.py` writes the op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.factors import Axes, aligned, told
from effopt.graph.analyses.lockstep import Series, is_backwards
from effopt.graph.analyses.loop_decay import Factor, decay_of
from effopt.graph.analyses.loop_outputs import Output
from effopt.graph.analyses.over_time import Timed, factors_of, nodes_of, number_of, require_timed, timed
from effopt.graph.analyses.readouts import ReadOut, collected_axes, read_out, require_unrounded
from effopt.graph.analyses.recurrences import Recurrence
from effopt.graph.layouts import require_dense
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import shape_of, val

_CHANNELS = frozenset("mn")
_LEADS = {4: ("b", "h"), 3: ("h",), 2: ()}


@dataclass(frozen=True)
class Product:
    """Keys times values, each a product itself, times a number. No values: ones."""

    keys: tuple[Timed, ...]
    values: tuple[Timed, ...]
    number: float = 1.0

    @property
    def factors(self) -> tuple[Timed, ...]:
        """All but the number."""
        return (*self.keys, *self.values)


@dataclass(frozen=True)
class RecurrentForm:
    """The operands of `effopt::linear_attention`, for one of the tensors that a loop collects."""

    output: Output
    query: Timed
    by: tuple[Timed, ...]
    """What a read-out multiplies the state by ahead of the query, bonus aside."""
    added: Product
    bonus: Product | None
    """What a read-out adds to the state before it multiplies by the query."""
    decay: tuple[Factor, ...]
    scale: float
    channel: str
    """The key's: `m` or `n`."""
    out: Axes
    """The axes of the collected read-outs."""
    backwards: bool
    is_vector: bool
    """Whether the state has a key's channel alone."""

    @property
    def operands(self) -> tuple[Timed, ...]:
        """All of them."""
        bonus = () if self.bonus is None else self.bonus.factors
        return (self.query, *self.by, *self.added.factors, *bonus, *(factor.of for factor in self.decay))

    @property
    def value_channel(self) -> str:
        """The other of `m` and `n`."""
        return "n" if self.channel == "m" else "m"


def read(found: Recurrence) -> tuple[RecurrentForm, ...]:
    """The linear attention that a recurrence computes, for each of its outputs. Raises `Reject`."""
    rank = len(shape_of(found.last))
    require(1 <= rank <= 4, f"its state has {rank} dimensions, at most 4 are known", found.last)
    require(bool(found.outputs), "its states are read by no step: only the last one is", found.last)
    state = _letters(found, rank)
    added = _added(found, found.added, state)
    return tuple(_form(found, output, added, state) for output in found.outputs)


def _letters(found: Recurrence, rank: int) -> Axes:
    """What the axes of a state are: of a matrix for each head, or of a vector that a query sums over."""
    matrix: Axes = (*_LEADS.get(rank, ()), "m", "n")
    if rank == 4:
        return matrix
    vector: Axes = (*_LEADS[rank + 1], "m")
    try:
        if rank > 1:
            _added(found, found.added, matrix)
            return matrix
        return vector
    except Reject:
        return vector if _summed(found.outputs[0].series, vector, found.last) == "m" else matrix


def _summed(series: Series, state: Axes, where: Node) -> str | None:
    """Which axis of a state a read-out sums over, if it is known to."""
    try:
        over = read_out(series, state, where).over
    except Reject:
        return None
    require(over is not None, "its states are collected as they are: no query is multiplied by them", where)
    return over


def _form(found: Recurrence, output: Output, added: Product, state: Axes) -> RecurrentForm:
    last, rank, is_vector = found.last, len(state), "n" not in state
    decay = None if found.decay is None else timed(found.decay, aligned(state, found.decay, last))
    # That is what a selective scan looks like, and its pass tells why it is none.
    require(decay is None or rank != 3 or not decay.letters >= _CHANNELS, "", last)
    seen = read_out(output.series, state, last)
    require_unrounded(output.series, val(output.collected.node).dtype, last)
    require(
        seen.over is not None, "its states are collected as they are: no query is multiplied by them", last
    )
    words = f"its read-out sums over {seen.over}, and a query is summed with a channel of the state"
    require(seen.over in _CHANNELS, words, last)
    assert seen.over is not None
    query = timed(seen.weight, seen.weight_axes)
    by = tuple(timed(*each) for each in seen.by)
    out = collected_axes(output.collected, seen.axes)
    wanted = (set(state) - {seen.over}) | {"t"}
    own = [axis for axis in out if axis is not None]
    require(set(own) == wanted and len(own) == rank, f"its outputs have axes {told(out)}", last)
    kept = () if decay is None else tuple(decay_of(decay, last))
    series = [x for x in (found.decay, found.added, output.series) if x is not None]
    backwards = is_backwards(series, found.steps)
    bonus = _bonus(seen, is_vector, last)
    added = _by_channel(added, seen.over, is_vector, last)
    form = RecurrentForm(
        output, query, by, added, bonus, kept, seen.scale, seen.over, out, backwards, is_vector
    )
    _require_operands(form, found)
    return form


def _added(found: Recurrence, series: Series, state: Axes) -> Product:
    """Factors of what a step adds; all of them as keys."""
    last = found.last
    value = timed(series, aligned(state, series, last))
    if "n" not in state:
        return Product((value,), ())
    product = _product(value, last)
    sides = [frozenset(channel) for channel in "mn"]
    both = all(any(side <= factor.letters for factor in product.keys) for side in sides)
    words = ", ".join(map(str, product.keys))
    require(both, f"what it adds is {words}, no product of a key and a value", last)
    return product


def _product(value: Timed, where: Node) -> Product:
    keys: list[Timed] = []
    number = 1.0
    for factor in factors_of(value, _CHANNELS, where):
        known = None if factor.letters else number_of(factor)
        if known is not None:
            number *= known
        else:
            keys.append(factor)
    return Product(tuple(keys), (), number)


def _bonus(seen: ReadOut, is_vector: bool, where: Node) -> Product | None:
    if seen.plus is None:
        return None
    assert seen.over is not None
    value = timed(seen.plus, seen.plus_axes)
    product = Product((value,), ()) if is_vector else _product(value, where)
    return _by_channel(product, seen.over, is_vector, where)


def _by_channel(product: Product, channel: str, is_vector: bool, where: Node) -> Product:
    """The factors of the key, and those of the value."""
    if is_vector:
        return product
    other = _CHANNELS - {channel}
    keys = tuple(factor for factor in product.keys if channel in factor.letters)
    values = tuple(factor for factor in product.keys if factor not in keys)
    both = bool(keys) and any(other <= factor.letters for factor in values)
    words = ", ".join(map(str, product.keys))
    require(both, f"what it adds is {words}, no product of a key and a value", where)
    return Product(keys, values, product.number)


def _require_operands(form: RecurrentForm, found: Recurrence) -> None:
    where, sizes = found.last, sizes_of_axes(found, form)
    require_dense(form.output.collected.node)
    require_dense(found.last)
    other = form.value_channel
    for factor in (form.query, *form.by):
        words = f"its query, {factor}, has the channel of the value"
        require(other not in factor.letters, words, where)
    is_channel = any(form.channel in factor.letters for factor in (form.query, *form.by))
    has_query = is_channel or statically_known_true(sizes[form.channel] == 1)
    require(has_query, f"its query, {form.query}, is one number for all channels", where)
    for gate in (factor.of for factor in form.decay):
        words = f"its decay, {gate}, differs between channels of the value: a gate is of tokens or keys"
        require(other not in gate.letters, words, where)
        words = f"its gates, {gate}, differ between channels, and its state is one vector a head: append ones"
        is_one = not form.is_vector or form.channel not in gate.letters
        require(is_one, f"{words} to the value, and read the normaliser with it", where)
    for operand in form.operands:
        require_timed(operand, sizes, where)
    for factor in form.added.factors:
        require(isinstance(factor.value, Series | Node), f"what it adds, {factor}, is a number", where)


def sizes_of_axes(found: Recurrence, form: RecurrentForm) -> dict[str, Any]:
    """The size of each axis."""
    shape = (*shape_of(found.last), 1) if form.is_vector else shape_of(found.last)
    named = dict(zip((*_LEADS[len(shape)], "m", "n"), shape, strict=True))
    return {"b": 1, "h": 1, "t": found.steps} | named


def covered(found: Recurrence) -> tuple[Node, ...]:
    """Every call that the op takes the place of: the loop, and what its steps read parts of."""
    try:
        forms = read(found)
    except Exception:  # noqa: BLE001 - whoever rewrites reads it too, and tells why it cannot be
        return found.nodes
    return found.down_to({node for form in forms for operand in form.operands for node in nodes_of(operand)})
