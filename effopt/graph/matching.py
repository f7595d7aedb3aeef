"""Matching a pattern at one node of a graph.

Arguments are compared by schema position, and those that a pattern does not name must hold their
schema default. `add`, `mul` and their like match either operand order, dimensions are compared
modulo the rank, and numbers by relative tolerance. Matching backtracks, and the furthest failure is
kept: it is the reason that the report gives for a near-miss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.constants import constant_number
from effopt.graph.ops.base import bind_schema
from effopt.graph.pattern import ANY, HOLE, AnyOf, Call, Capture, Chain, Named, Pattern, Step
from effopt.graph.values import val

COMMUTATIVE = frozenset(
    "add mul maximum minimum bitwise_and bitwise_or logical_and logical_or __and__ __or__ eq ne".split()
)
_DIM_ARGUMENTS = frozenset({"dim", "dims", "dim0", "dim1", "normalized_shape_dim"})
_NUMBER_TOLERANCE = 1e-6  # a constant written as 0.7978845608 or computed as sqrt(2 / pi) is one constant


@dataclass(frozen=True)
class State:
    """Bindings and interior nodes of a partial match. Never changed in place, so backtracking is free."""

    captures: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    def bind(self, name: str, value: Any) -> State | None:
        """With `name` bound to `value`; None if it is bound to something else."""
        if name in self.captures:
            return self if same(self.captures[name], value) else None
        return State({**self.captures, name: value}, self.nodes)

    def visit(self, node: Node) -> State:
        """With `node` counted as interior."""
        return self if node in self.nodes else State(self.captures, (*self.nodes, node))


@dataclass
class Miss:
    """The furthest that matching one root came before it failed."""

    node: Node | None = None
    reason: str = ""
    nodes: tuple[Node, ...] = ()

    def note(self, state: State, node: Node | None, reason: Callable[[], str]) -> None:
        """Keep this failure if no earlier one got further; most are not kept, and so never put in words."""
        if self.node is None or len(state.nodes) > len(self.nodes):
            self.node, self.reason, self.nodes = node, reason(), state.nodes


def same(a: Any, b: Any) -> bool:
    """Whether two argument values are one value, without guarding on symbols."""
    if a is b:
        return True
    if isinstance(a, Node) or isinstance(b, Node) or isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return (
            isinstance(a, (int, torch.SymInt))
            and isinstance(b, (int, torch.SymInt))
            and statically_known_true(a == b)
        )
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b or math.isclose(a, b, rel_tol=_NUMBER_TOLERANCE)
    return bool(type(a) is type(b) and a == b)


def _is_given(value: Any) -> bool:
    return isinstance(value, Node) and value.op in ("placeholder", "get_attr")


def _equals(literal: Any, value: Any) -> bool:
    is_number = isinstance(literal, (int, float))
    return same(literal, value) or (is_number and same(literal, constant_number(value)))


def _is_plain(pattern: Any) -> bool:
    if isinstance(pattern, (list, tuple)):
        return all(_is_plain(p) for p in pattern)
    return not isinstance(pattern, Pattern)


def bound_arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call by schema name; positional names for `getitem`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bind_schema(node.target, node.args, node.kwargs)
    return {str(i): a for i, a in enumerate(node.args)}


class Matcher:
    """Matches one pattern at one root. `miss` tells where the furthest attempt failed."""

    def __init__(self, pattern: Any) -> None:
        self.pattern = pattern
        self.miss = Miss()

    def solutions(self, root: Node) -> Iterator[State]:
        """Every way in which the pattern matches at `root`, lazily."""
        self.miss = Miss()
        yield from self._walk(self.pattern, root, State(), None)

    def _walk(self, pattern: Any, value: Any, state: State, user: Node | None) -> Iterator[State]:
        if isinstance(pattern, Capture):
            yield from self._capture(pattern, value, state, user)
        elif isinstance(pattern, Call):
            yield from self._call(pattern, value, state, user)
        elif isinstance(pattern, AnyOf):
            yield from self._any_of(pattern, value, state, user)
        elif isinstance(pattern, Named):
            for found in self._walk(pattern.pattern, value, state, user):
                named = found.bind(pattern.name, value)
                if named is not None:
                    yield named
        elif isinstance(pattern, Chain):
            yield from self._chain(pattern, value, state, user, ())
        elif pattern is HOLE:
            yield State({**state.captures, "": value}, state.nodes)
        elif pattern is ANY:
            yield state
        elif isinstance(pattern, (list, tuple)) and isinstance(value, (list, tuple)):
            yield from self._sequence(pattern, value, state, user)
        elif _equals(pattern, value):
            yield state
        else:
            self.miss.note(state, user, lambda: f"expected {pattern!r}, got {_show(value)}")

    def _any_of(self, pattern: AnyOf, value: Any, state: State, user: Node | None) -> Iterator[State]:
        target = value.target if isinstance(value, Node) else None
        tried = False
        for index, (option, heads) in enumerate(zip(pattern.options, pattern.heads, strict=True)):
            if heads is not None and target not in heads:
                continue  # no miss of its own: an option that cannot start here explains nothing
            tried = True
            for found in self._walk(option, value, state, user):
                tagged = found.bind(pattern.tag, index) if pattern.tag else found
                if tagged is not None:
                    yield tagged
        if not tried:
            self.miss.note(state, user, lambda: f"expected {pattern.describe()}, got {_show(value)}")

    def _capture(self, pattern: Capture, value: Any, state: State, user: Node | None) -> Iterator[State]:
        if pattern.kind == "number":
            found = constant_number(value)
            if found is None:
                self.miss.note(
                    state, user, lambda: f"{pattern.name} is not a compile-time number: {_show(value)}"
                )
                return
            value = found
        elif pattern.kind == "node" and not isinstance(value, Node):
            self.miss.note(state, user, lambda: f"{pattern.name} is not a tensor: {_show(value)}")
            return
        elif pattern.kind == "parameter" and not _is_given(value):
            self.miss.note(state, user, lambda: f"{pattern.name} is computed, not an input: {_show(value)}")
            return
        bound = state.bind(pattern.name, value)
        if bound is None:
            was = _show(state.captures[pattern.name])
            self.miss.note(
                state, user, lambda: f"{pattern.name} is {was} in one place and {_show(value)} in another"
            )
        else:
            yield bound

    def _call(self, pattern: Call, value: Any, state: State, user: Node | None) -> Iterator[State]:
        if not isinstance(value, Node) or value.target not in pattern.targets:
            self.miss.note(state, user, lambda: f"expected {pattern.family}, got {_show(value)}")
            return
        actual = bound_arguments(value)
        names = list(actual)
        expected = dict(zip(names, pattern.args, strict=False)) | dict(pattern.kwargs)
        for name in names[len(pattern.args) :]:
            if name not in expected and not self._is_default(value, name, actual[name]):
                self.miss.note(
                    state, value, functools.partial(_unexpected, pattern.family, name, actual[name])
                )
                return
        inside = state.visit(value)
        pairs = [(pattern_arg, actual.get(name), name) for name, pattern_arg in expected.items()]
        yield from self._arguments(pairs, value, inside)
        if pattern.family in COMMUTATIVE and len(pairs) >= 2:
            (p0, v0, n0), (p1, v1, n1) = pairs[:2]
            yield from self._arguments([(p0, v1, n0), (p1, v0, n1), *pairs[2:]], value, inside)

    @staticmethod
    def _is_default(node: Node, name: str, value: Any) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload):
            return True
        argument = next(a for a in node.target._schema.arguments if a.name == name)
        return argument.has_default_value() and same(argument.default_value, value)

    def _arguments(self, pairs: Sequence[tuple[Any, Any, str]], node: Node, state: State) -> Iterator[State]:
        if not pairs:
            yield state
            return
        (pattern, value, name), *rest = pairs
        wanted, got = pattern, value
        if name in _DIM_ARGUMENTS:
            pattern, value = _modulo_rank(pattern, value, _rank_of_dims(node))
        if _is_plain(pattern):
            if _equals(pattern, value):
                yield from self._arguments(rest, node, state)
            else:
                self.miss.note(state, node, lambda: f"{name} is {_show(got)}, expected {wanted!r}")
            return
        for found in self._walk(pattern, value, state, node):
            yield from self._arguments(rest, node, found)

    def _sequence(self, patterns: Any, values: Any, state: State, user: Node | None) -> Iterator[State]:
        if len(patterns) != len(values):
            self.miss.note(state, user, lambda: f"expected {len(patterns)} entries, got {len(values)}")
            return
        if not patterns:
            yield state
            return
        for found in self._walk(patterns[0], values[0], state, user):
            yield from self._sequence(patterns[1:], values[1:], found, user)

    def _chain(
        self, pattern: Chain, value: Any, state: State, user: Node | None, done: tuple[Step, ...]
    ) -> Iterator[State]:
        if isinstance(value, Node):
            for tag, step in pattern.steps:
                for found in self._walk(step, value, State({}, state.nodes), user):
                    captures = dict(found.captures)
                    rest = captures.pop("")
                    # The chain binds innermost step first: the order in which a model applies them.
                    steps = (Step(tag, value, captures), *done)
                    yield from self._chain(pattern, rest, State(state.captures, found.nodes), value, steps)
        for found in self._walk(pattern.base, value, state, user):
            bound = found.bind(pattern.name, done)
            if bound is not None:
                yield bound


def _rank_of_dims(node: Node) -> int:
    """The rank that a call's dimensions count in: that of its first operand, or of the result of `stack`."""
    inserts = node.target in (torch.ops.aten.stack.default, torch.ops.aten.unsqueeze.default)
    first = node if inserts else node.args[0]
    value = val(first[0] if isinstance(first, (list, tuple)) and first else first)
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _modulo_rank(pattern: Any, value: Any, rank: int) -> tuple[Any, Any]:
    def wrap(dim: Any) -> Any:
        if isinstance(dim, (list, tuple)):
            return [wrap(d) for d in dim]
        return dim % rank if rank and type(dim) is int else dim

    if isinstance(pattern, AnyOf) and not any(isinstance(o, Pattern) for o in pattern.options):
        return AnyOf(tuple(wrap(o) for o in pattern.options), pattern.tag), wrap(value)
    return (pattern if isinstance(pattern, Pattern) else wrap(pattern)), wrap(value)


def _show(value: Any) -> str:
    if isinstance(value, Node):
        return (
            f"{value.name} ({value.target})" if value.op == "call_function" else f"{value.name} ({value.op})"
        )
    return repr(value)


def _unexpected(family: str, name: str, value: Any) -> str:
    return f"{family} has {name}={_show(value)}"
