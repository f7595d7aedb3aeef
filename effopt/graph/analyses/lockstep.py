"""What one place of a loop's body holds in every step, once the loop is unrolled.

    select(x, 2, 0), select(x, 2, 1), select(x, 2, 2)         Along(x, axis=2)
    exp(select(x, 2, 0)), exp(select(x, 2, 1)), ..            Apply(exp, Along(x, axis=2))

Compares the nodes of all steps at once: equal calls whose operands are again alike, down to values that
every step reads, and to consecutive parts of one tensor. Exact: arguments are equal in type and value, and
nothing random is taken for equal. Looks only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.no_ops import stands_for
from effopt.graph.analyses.step_forms import Inner
from effopt.graph.matching import bound_arguments
from effopt.graph.rewrite import require
from effopt.graph.values import val

_aten = torch.ops.aten
_DEEPEST = 32  # calls on top of each other in one step; those of known models have at most eight


@dataclass(frozen=True)
class Same:
    """A value that every step reads."""

    node: Any
    """A node; or a number, equal in type and value in all steps."""


@dataclass(frozen=True)
class Along:
    """Step i reads the part of `base` at `first + i * stride` along `axis`."""

    base: Node
    axis: int
    first: int
    stride: int
    """1, or -1 from the last part to the first."""
    keeps_axis: bool
    """Whether the axis stays, with size 1."""


@dataclass(frozen=True)
class State:
    """What the recurrence carries."""

    is_before: bool = False
    """Whether it is what a step found, not what the step made of it."""


@dataclass(frozen=True)
class Apply:
    """The same call in every step."""

    target: Any
    args: tuple[Any, ...]
    """By position as in the first step, with a `Series` for each node."""
    kwargs: dict[str, Any] = field(hash=False)
    nodes: tuple[Node, ...] = field(repr=False)
    """The calls, in the order of the steps; for calls made within others, nodes of their shape and dtype."""


Series = Same | Along | State | Apply


@dataclass(frozen=True)
class Part:
    """One position of a tensor along an axis."""

    base: Node
    axis: int
    position: int
    keeps_axis: bool


def part_at(node: Node) -> Part | None:
    """What `node` takes of a tensor, if that is one position of an axis and everything of the others."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _of_several(node)
    if node.target not in (_aten.select.int, _aten.slice.Tensor):
        return None
    base, axis, position, *_ = bound_arguments(node).values()
    position = 0 if position is None else position
    size = val(base).shape[axis]
    if type(position) is int and position < 0 and type(size) is int:
        position += size
    if type(position) is not int or position < 0:
        return None
    keeps_axis = node.target is _aten.slice.Tensor
    if keeps_axis and not statically_known_true(val(node).shape[axis] == 1):
        return None
    return Part(base, axis % val(base).dim(), position, keeps_axis)


def _of_several(node: Node) -> Part | None:
    """A result of `unbind`, or of a `split` into parts of size 1."""
    whole, position = node.args
    if not isinstance(whole, Node) or whole.op != "call_function" or type(position) is not int:
        return None
    if whole.target is _aten.unbind.int:
        base, axis = bound_arguments(whole).values()
    elif whole.target in (_aten.split.Tensor, _aten.split_with_sizes.default):
        base, size, axis = bound_arguments(whole).values()
        ones = size == 1 or (isinstance(size, (list, tuple)) and all(n == 1 for n in size))
        if not ones:
            return None
    else:
        return None
    return Part(base, axis % val(base).dim(), position, whole.target is not _aten.unbind.int)


def leaves(series: Series) -> Iterator[Same | Along | State]:
    """The values that a series is made of, outermost first; numbers left out."""
    if not isinstance(series, Apply):
        if not isinstance(series, Same) or isinstance(series.node, Node):
            yield series
        return
    for value in (*series.args, *series.kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Same | Along | State | Apply):
                yield from leaves(item)


def is_backwards(series: Iterable[Series], steps: int) -> bool:
    """Whether steps go from the last position to the first. Raises `Reject` unless they read all positions.

    `series` hold at least one `Along`.
    """
    parts = [leaf for each in series for leaf in leaves(each) if isinstance(leaf, Along)]
    backwards = parts[0].stride < 0
    for part in parts:
        size, turned = val(part.base).shape[part.axis], part.stride < 0
        whole = statically_known_true(size == steps) and part.first == (steps - 1) * turned
        words = f"its steps read {steps} of the {size} places of {part.base.name}, from {part.first}"
        require(whole, words, part.base)
        ways = f"its steps read {part.base.name} and {parts[0].base.name} in opposite directions"
        require(turned == backwards, ways, part.base)
    return backwards


class Lockstep:
    """Reads the bodies of all steps side by side. Keeps what it saw, so that it sees a node once."""

    def __init__(self, states: Sequence[Any] = (), before: Sequence[Any] = ()) -> None:
        """`states`: what the recurrence carries, as each step reads it; `before`: as each step found it."""
        self._states, self._before = tuple(states), tuple(before)
        self._known: dict[tuple[Node, ...], Series] = {}
        self.nodes: dict[Node, None] = {}
        """All calls that belong to the steps."""
        self.reading: set[Node] = set()
        """Those that depend on the state."""
        self.has_parts = False
        """Whether anything was found that goes along a tensor."""

    def series(self, nodes: Sequence[Any], depth: int = 0) -> Series:
        """What `nodes`, one of each step, have in common. Raises `Reject`."""
        key = tuple(nodes)
        if key and key in (self._states, self._before):
            return State(key != self._states)
        if any(isinstance(node, Inner) for node in key):
            return self._inner(key, depth)
        if not all(isinstance(node, Node) for node in key):
            return Same(self._argument(key, depth))  # not remembered: as keys, 1, 1.0 and True are equal
        if key not in self._known:
            self._known[key] = self._read(key, depth)
        return self._known[key]

    def _read(self, nodes: tuple[Node, ...], depth: int) -> Series:
        first = nodes[0]
        if all(node is first for node in nodes):
            return Same(first)
        require(depth < _DEEPEST, f"its steps are more than {_DEEPEST} calls deep", first)
        sources = [stands_for(node) for node in nodes]
        if all(source is not None for source in sources):
            series = self.series(sources, depth + 1)
            self._keep(nodes, series)
            return series
        return self._parts(nodes, depth) or self._calls(nodes, depth)

    def _parts(self, nodes: tuple[Node, ...], depth: int) -> Series | None:
        parts = [part_at(node) for node in nodes]
        one = parts[0]
        if one is None or any(
            p is None or (p.axis, p.keeps_axis) != (one.axis, one.keeps_axis) for p in parts
        ):
            return None
        positions = [p.position for p in parts if p is not None]
        if len(set(positions)) == 1:
            return None
        base = self.series([whole_of(p.base) for p in parts if p is not None], depth + 1)
        if not isinstance(base, Same):
            return None
        self.has_parts = True
        stride = positions[1] - positions[0]
        expected = list(range(one.position, one.position + stride * len(nodes), stride)) if stride else []
        told = f"{', '.join(map(str, positions[:6]))}{', ..' if len(positions) > 6 else ''}"
        require(
            abs(stride) == 1 and positions == expected,
            f"its steps read {base.node.name} at {told} of axis {one.axis}: not one after the other",
            nodes[-1],
        )
        self._keep(nodes, base)
        for node in nodes:
            if node.target is operator.getitem:
                self.nodes[node.args[0]] = None  # type: ignore[index]
        return Along(base.node, one.axis, one.position, stride, one.keeps_axis)

    def _calls(self, nodes: tuple[Any, ...], depth: int) -> Series:
        first = nodes[0]
        for step, node in enumerate(nodes):
            is_alike = node.op == first.op and (
                node is first or (node.op == "call_function" and node.target == first.target)
            )
            require(is_alike, f"its steps differ: {_told(first)} in one, {_told(node)} in step {step}", node)
        args = tuple(
            self._argument([node.args[i] if i < len(node.args) else _ABSENT for node in nodes], depth)
            for i in range(max(len(node.args) for node in nodes))
        )
        names = {name: None for node in nodes for name in node.kwargs}
        kwargs = {n: self._argument([node.kwargs.get(n, _ABSENT) for node in nodes], depth) for n in names}
        # Asked last: what goes along a tensor was then seen, and tells a loop from other sums.
        is_random = torch.Tag.nondeterministic_seeded in getattr(first.target, "tags", ())
        require(not is_random, f"each step draws random numbers, by {first.target}", first)
        made = Apply(first.target, args, kwargs, nodes)
        found = list(leaves(made))
        self._keep(nodes, made)
        # Equal calls on equal operands give one value, computed in every step anew.
        return Same(first) if found and all(isinstance(leaf, Same) for leaf in found) else made

    def _inner(self, calls: tuple[Any, ...], depth: int) -> Series:
        """Of calls within others; one that has a node of its own may be among them."""
        (target, *_), where = {call.target: None for call in calls if isinstance(call, Inner)}, calls[-1]
        where = where.like if isinstance(where, Inner) else where
        for call in calls:
            is_alike = isinstance(call, Inner | Node) and call.target == target
            require(is_alike, f"its steps differ: {_told(call)} is no {target}", where)
        given = [c.args if isinstance(c, Inner) else tuple(bound_arguments(c).values()) for c in calls]
        args = tuple(self._argument(column, depth) for column in zip(*given, strict=True))
        made = Apply(target, args, {}, tuple(c.like if isinstance(c, Inner) else c for c in calls))
        self._keep([call for call in calls if isinstance(call, Node)], made)
        return made

    def _argument(self, values: Sequence[Any], depth: int) -> Any:
        first = values[0]
        if all(isinstance(value, Node | Inner) for value in values):
            return self.series(values, depth + 1)
        if isinstance(first, (list, tuple)) and all(isinstance(v, (list, tuple)) for v in values):
            require(len({len(v) for v in values}) == 1, "its steps differ in the number of operands", None)
            return tuple(self._argument(column, depth) for column in zip(*values, strict=True))
        for step, value in enumerate(values):
            is_equal = not isinstance(value, Node) and type(value) is type(first) and value == first
            require(is_equal, f"its steps differ: {_told(first)} in one, {_told(value)} in step {step}")
        return first

    def _keep(self, nodes: Sequence[Node], series: Series) -> None:
        self.nodes.update(dict.fromkeys(nodes))
        if any(isinstance(leaf, State) for leaf in leaves(series)):
            self.reading.update(nodes)


_ABSENT = object()


def whole_of(node: Node) -> Node:
    """What `node` gives back unchanged: a slice of everything is its operand."""
    while (source := stands_for(node)) is not None:
        node = source
    return node


def _told(value: Any) -> str:
    return f"{value.name} ({value.target})" if isinstance(value, Node) else repr(value)
