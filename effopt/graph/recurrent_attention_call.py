"""Writing the linear attention that a loop is, for each of the tensors that it collects."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses.loop_decay import Factor, Kind
from effopt.graph.analyses.recurrences import Recurrence
from effopt.graph.layouts import laid_out_as
from effopt.graph.recurrent_attention_form import Product, RecurrentForm, sizes_of_axes
from effopt.graph.rewrite import Emit
from effopt.graph.steps import Steps
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten


def write(emit: Emit, found: Recurrence, forms: Sequence[RecurrentForm]) -> tuple[Node, ...]:
    """Emit the op: what was collected, and the last state, in the dtypes and layouts that they had."""
    outs = []
    for form in forms:
        y, last = _Call(emit, found, form, Steps(emit, sizes_of_axes(found, form), form.backwards)).written()
        outs.append(y)
    return (*outs, last)


@dataclass(frozen=True)
class _Call:
    """One call of the op."""

    emit: Emit
    found: Recurrence
    form: RecurrentForm
    steps: Steps

    @property
    def rows(self) -> tuple[str, ...]:
        """The axes of a query and a key."""
        return ("b", "h", "t", self.form.channel)

    @property
    def columns(self) -> tuple[str, ...]:
        """The axes of a value and of the result."""
        return ("b", "h", "t", self.form.value_channel)

    def written(self) -> tuple[Node, Node]:
        """The result, and the last state."""
        emit, form, output = self.emit, self.form, self.form.output
        wanted, held = val(output.collected.node).dtype, val(self.found.last).dtype
        query = self.steps.product([form.query, *form.by], self.rows)
        given = [query, self._keys(form.added), self._values(form.added, query)]
        dtype = wanted
        for node in given:
            dtype = torch.promote_types(dtype, val(node).dtype)
        # The op computes in the dtype of the query, or float32: a wider state is kept as wide as it was.
        dtype = held if held == torch.float64 else dtype
        wide = torch.promote_types(dtype, torch.float32)
        more: dict[str, Node] = {}
        if form.decay:
            more["decay"] = self._decay(query, wide)
        start = self._start(query, wide)
        if start is not None:
            more["state"] = start
        if output.is_before:
            given, more = self._a_step_later(given, more)
        given = [emit.cast(node, dtype) for node in given]
        both = emit(ops.linear_attention, *given, scale=form.scale, **more)
        y = emit(operator.getitem, both, 0)
        if self._is_longer:
            y = emit(_aten.slice.Tensor, y, 2, 0, self.found.steps)
        if form.bonus is not None:
            y = emit(_aten.add.Tensor, emit.cast(y, wide), self._bonus(form.bonus, wide))
        return self._out(emit.cast(y, wanted)), self._last(emit.cast(emit(operator.getitem, both, 1), held))

    @property
    def _is_longer(self) -> bool:
        """Whether the op takes a token more: the last state then has seen the last key, and no query has."""
        return self.form.output.is_before and self.found.reads_last

    def _keys(self, product: Product) -> Node:
        return self.steps.product(product.keys, self.rows)

    def _values(self, product: Product, like: Node) -> Node:
        if product.values:
            node = self.steps.product(product.values, self.columns)
            return node if product.number == 1.0 else self.emit(_aten.mul.Tensor, node, product.number)
        sizes = [self.steps.sizes[axis] for axis in self.columns]
        return self.emit(_aten.new_full.default, like, sizes, product.number)

    def _a_step_later(self, given: list[Node], more: dict[str, Node]) -> tuple[list[Node], dict[str, Node]]:
        """Key, value and decay of the token before: the state that a token finds is of those ahead of it.

        The first token has a key of zeros, and keeps all.
        """
        longer, emit = int(self._is_longer), self.emit
        query, *others = given
        query = emit(_aten.constant_pad_nd.default, query, [0, 0, 0, 1]) if longer else query
        others = [emit(_aten.constant_pad_nd.default, x, [0, 0, 1, longer - 1]) for x in others]
        if "decay" in more:
            widths = [*(0, 0) * (val(more["decay"]).dim() - 3), 1, longer - 1]
            more = more | {"decay": emit(_aten.constant_pad_nd.default, more["decay"], widths)}
        return [query, *others], more

    def _bonus(self, bonus: Product, wide: torch.dtype) -> Node:
        """What each token reads of what is added to the state for it alone."""
        emit = self.emit
        query = self.steps.product([self.form.query], self.rows)
        weighed = emit(_aten.mul.Tensor, emit.cast(query, wide), emit.cast(self._keys(bonus), wide))
        weight = emit(_aten.sum.dim_IntList, weighed, [-1], True)
        product = emit(_aten.mul.Tensor, weight, emit.cast(self._values(bonus, query), wide))
        return product if self.form.scale == 1.0 else emit(_aten.mul.Tensor, product, self.form.scale)

    def _decay(self, query: Node, wide: torch.dtype) -> Node:
        """The sum of all logarithms: `[h]`, `[b, h, t]` or `[b, h, t, d]`."""
        form, emit, steps = self.form, self.emit, self.steps
        letters = frozenset[str]().union(*(factor.of.letters for factor in form.decay))
        axes: tuple[str, ...] = ("h",)
        is_of_head = not letters & {"b", form.channel} and not any(f.of.is_of_time for f in form.decay)
        if form.output.is_before or not is_of_head:
            axes = ("b", "h", "t", *([form.channel] if form.channel in letters else []))
        numbers = [f.by * math.log(f.of.value) for f in form.decay if f.kind is Kind.NUMBER]
        total = None
        for factor in form.decay:
            if factor.kind is not Kind.NUMBER:
                one = _logarithm(emit, factor, steps.laid_out(factor.of, axes), wide)
                total = one if total is None else emit(_aten.add.Tensor, total, one)
        if total is None:
            sizes = [steps.sizes[axis] for axis in axes]
            return emit(_aten.new_full.default, query, sizes, sum(numbers), dtype=wide)
        total = emit(_aten.add.Tensor, total, sum(numbers)) if numbers else total
        total = steps.expanded(total, axes)
        if self.found.opens and len(axes) > 1:
            # What the first step would be decayed by is not read in the loop: it may be NaN.
            later = emit(_aten.slice.Tensor, total, 2, 1, self.found.steps)
            total = emit(_aten.constant_pad_nd.default, later, [*(0, 0) * (len(axes) - 3), 1, 0])
        return total

    def _start(self, query: Node, wide: torch.dtype) -> Node | None:
        """The given state, `[b, h, d, dv]`; None: zeros."""
        emit, form, start = self.emit, self.form, self.found.start
        if start is not None:
            start = emit(_aten.unsqueeze.default, start, -1) if form.is_vector else start
            start = emit(_aten.transpose.int, start, -2, -1) if form.channel == "n" else start
            for _ in range(4 - len(shape_of(start))):
                start = emit(_aten.unsqueeze.default, start, 0)
            return emit.cast(start, wide)
        if self.found.opens or all(f.kind in (Kind.NUMBER, Kind.CONSTANT) for f in form.decay):
            return None
        # A gate of the first token that is NaN or infinite spoils zeros: 0 * NaN is NaN.
        sizes = [self.steps.sizes[axis] for axis in ("b", "h", form.channel, form.value_channel)]
        return emit(_aten.new_zeros.default, query, sizes, dtype=wide)

    def _out(self, y: Node) -> Node:
        emit, form = self.emit, self.form
        y = emit(_aten.flip.default, y, [2]) if form.output.reverse else y
        y = emit(_aten.squeeze.dim, y, -1) if form.is_vector else y
        have = self.columns[:3] if form.is_vector else self.columns
        axes = [axis for axis in form.out if axis is not None]
        for _ in range(len(have) - len(axes)):
            y = emit(_aten.squeeze.dim, y, 0)
        order = [have[len(have) - len(axes) :].index(axis) for axis in axes]
        y = y if order == sorted(order) else emit(_aten.permute.default, y, order)
        for dim in [dim for dim, axis in enumerate(form.out) if axis is None]:
            y = emit(_aten.unsqueeze.default, y, dim)
        return laid_out_as(emit, y, form.output.collected.node)

    def _last(self, last: Node) -> Node:
        emit, form = self.emit, self.form
        last = emit(_aten.squeeze.dim, last, -1) if form.is_vector else last
        for _ in range(len(shape_of(last)) - len(shape_of(self.found.last))):
            last = emit(_aten.squeeze.dim, last, 0)
        last = emit(_aten.transpose.int, last, -2, -1) if form.channel == "n" else last
        return laid_out_as(emit, last, self.found.last)


def _logarithm(emit: Emit, factor: Factor, of: Node, wide: torch.dtype) -> Node:
    of = emit.cast(of, wide)
    if factor.kind is Kind.CONSTANT:
        of = emit(_aten.log.default, of)
    elif factor.kind is not Kind.EXPONENT:
        of = emit(_aten.neg.default, of) if factor.kind is Kind.REST_OF_SIGMOID else of
        of = emit(_aten.log_sigmoid.default, of)
    return of if factor.by == 1.0 else emit(_aten.mul.Tensor, of, factor.by)
