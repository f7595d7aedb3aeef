"""Which pointwise work each step of a loop does on what it reads of its state, ahead of its collection.

    stack([silu(r_0) * g[0], silu(r_1) * g[1], ..])
        Apply(mul, (Apply(silu, (Each((r_0, r_1, ..)),)), Along(g)))

A pointwise call of one step is that part of the same call of all steps at once. What is not alike, or not
pointwise, is a value of each step, to be collected itself. Looks only. Exact: nothing is assumed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.collected import (
    JOINS,
    WRITES,
    Collected,
    collected,
    collectors,
    collects,
    is_alive,
)
from effopt.graph.analyses.factors import reshaped
from effopt.graph.analyses.heads import VIEWS
from effopt.graph.analyses.lockstep import Along, Apply, Lockstep, Same
from effopt.graph.analyses.no_ops import COPIES
from effopt.graph.analyses.over_time import is_pointwise
from effopt.graph.analyses.step_chains import chains, steps_by_form
from effopt.graph.analyses.step_forms import Step
from effopt.graph.constants import SCALINGS, constant_number
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_LAYOUTS = (
    *COPIES,
    _aten.unsqueeze.default,
    _aten.expand.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.t.default,
    _aten.squeeze.dim,
    _aten.select.int,
    _aten.slice.Tensor,
)


@dataclass(frozen=True)
class Each:
    """Values of the steps that are computed one by one."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Work:
    """What the steps of a loop compute pointwise of their read-outs."""

    collected: Collected
    tree: Any
    """An `Apply`, with `Each`, `Along` and `Same` below; the first step first."""
    is_turned: bool
    """Whether the first step is the last that is collected."""
    moving: tuple[Node, ...]
    """The calls that depend on a state, and are to stand behind the loop."""
    left: tuple[Node, ...]
    """What they are made of in each step, and depends on a state; but for states."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The calls that move, those that collect, and what nothing comes of; in graph order."""
        nodes = {*self.moving, *self.collected.nodes}
        waiting = list(self.collected.nodes)
        while waiting:
            dead = {user for user in waiting.pop().users if user not in nodes and not is_alive(user)}
            nodes |= dead
            waiting.extend(dead)
        return tuple(sorted(nodes))

    def require_inside(self) -> None:
        """That nothing reads what moves, or what is collected instead, for the next step. Raises `Reject`."""
        inside = set(self.nodes)
        for node in (*self.moving, *self.left):
            for user in node.users:
                is_inside = user in inside or (node in self.left and user.target in (*JOINS, *WRITES))
                told = f"what a step collects, {node.name}, is also read by {user.name}: it stays in the loop"
                require(is_inside or not is_alive(user), told, node)


def works(graph: Graph) -> Iterator[Work]:
    """All of a graph."""
    if not collects(graph):
        return
    loops = [chain for chain in chains(steps_by_form(graph)) if _is_loop(chain)]
    states = {step.node for chain in loops for step in chain} | {chain[0].previous for chain in loops}
    depending: set[Node] = set()
    for node in graph.nodes if loops else ():
        if node in states or any(operand in depending for operand in node.all_input_nodes):
            depending.add(node)
    seen: set[Node] = set()
    for chain in loops:
        for last in collectors(chain[0].node, (chain[1].node,)):
            if last not in seen:
                seen.add(last)
                yield from _work(last, len(chain), states, depending)


def _is_loop(chain: Sequence[Step]) -> bool:
    """Whether its steps read one part of a tensor after another."""
    lockstep = Lockstep([step.previous for step in chain])
    with suppress(Reject):
        lockstep.series([step.added for step in chain])
    return lockstep.has_parts


def _work(last: Node, steps: int, states: set[Any], depending: set[Node]) -> Iterator[Work]:
    try:
        found = collected(last)
    except Reject:  # whoever reads the loop tells
        return
    if len(found.values) not in (steps, steps + 1) or last not in depending:
        return
    for is_turned in (False, True):
        reader = _Reader(states, depending)
        try:
            tree = reader.read(found.values[::-1] if is_turned else found.values)
        except Reject:
            return
        if reader.goes_back and not is_turned:
            continue
        if not isinstance(tree, Each):
            parts = list(_parts(tree))
            moving = {node for part in parts if isinstance(part, Apply) for node in part.nodes} & depending
            left = {node for part in parts if isinstance(part, Each) for node in part.nodes} & depending
            yield Work(found, tree, is_turned, tuple(sorted(moving)), tuple(sorted(left - states)))
        return


def _parts(tree: Any) -> Iterator[Any]:
    yield tree
    for below in tree.args if isinstance(tree, Apply) else ():
        yield from _parts(below)


class _Reader:
    """Reads the values of all steps side by side."""

    def __init__(self, states: set[Any], depending: set[Node]) -> None:
        self._states, self._depending = states, depending
        self._known: dict[tuple[Any, ...], Any] = {}
        self._lockstep = Lockstep()
        self.goes_back = False
        """Whether a step reads the part ahead of that of the step before it."""

    def read(self, values: tuple[Node, ...]) -> Any:
        """The tree of what `values` are, one of each step."""
        if values not in self._known:
            self._known[values] = self._read(values)
        return self._known[values]

    def _read(self, values: tuple[Node, ...]) -> Any:
        is_of_state = any(value in self._depending for value in values)
        if not is_of_state:
            series = self._series(values)
            if series is not None:
                return series
        alike = self._alike(values)
        is_left = alike is None or any(value in self._states for value in values)
        if not is_left and (not is_of_state or _has_work(alike)):
            return alike
        first = val(values[0])
        for value in map(val, values):
            is_same = value.dtype == first.dtype and value.dim() == first.dim()
            fits = is_same and all(map(statically_known_true, map(operator.eq, value.shape, first.shape)))
            require(fits, "its steps differ in the shape or dtype of what they compute", values[0])
        return Each(values)

    def _series(self, values: tuple[Node, ...]) -> Same | Along | None:
        """What every step reads, or its place in one tensor."""
        try:
            series = self._lockstep.series(values)
        except Reject:
            return None
        if isinstance(series, Along):
            self.goes_back |= series.stride < 0
            size = val(series.base).shape[series.axis]
            is_whole = series.stride == 1 and series.first == 0 and statically_known_true(size == len(values))
            return series if is_whole else None
        return series if isinstance(series, Same) else None

    def _alike(self, values: tuple[Node, ...]) -> Apply | None:
        first = values[0]
        is_call = all(value.op == "call_function" and value.target == first.target for value in values)
        if not is_call or not _goes_through(first) or len({len(value.args) for value in values}) > 1:
            return None
        kwargs = first.kwargs
        if any(value.kwargs != kwargs for value in values) or any(
            isinstance(x, Node) for x in kwargs.values()
        ):
            return None
        args = []
        for column in zip(*(value.args for value in values), strict=True):
            if all(isinstance(x, Node) and isinstance(val(x), torch.Tensor) for x in column):
                args.append(self.read(column))
            elif all(type(x) is type(column[0]) and x == column[0] for x in column):
                args.append(column[0])
            else:
                return None
        return Apply(first.target, tuple(args), dict(kwargs), values)


def _goes_through(node: Node) -> bool:
    """Whether a call is pointwise, or lays its operand out in a way that axes can be followed through."""
    if node.target in VIEWS:
        source: Any = node.args[0]
        return reshaped(node.target, node, source, (None,) * len(shape_of(node))) is not None
    return node.target in _LAYOUTS or node.target is _aten._to_copy.default or is_pointwise(node.target)


def _has_work(tree: Any) -> bool:
    """Whether there is more than scaling by a number, one cast, and layout: a read-out may have those."""
    if not isinstance(tree, Apply):
        return False
    is_scaled = tree.target in SCALINGS and constant_number(tree.nodes[0].args[1]) is not None
    casts = _casts(tree)
    is_work = is_pointwise(tree.target) and not is_scaled and tree.target not in COPIES
    return is_work or casts > 1 or any(_has_work(below) for below in tree.args)


def _casts(tree: Any) -> int:
    if isinstance(tree, Each):
        return int(tree.nodes[0].target is _aten._to_copy.default)
    if not isinstance(tree, Apply):
        return 0
    return int(tree.target is _aten._to_copy.default) + max(map(_casts, tree.args), default=0)
