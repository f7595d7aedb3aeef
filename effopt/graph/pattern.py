"""The pattern language: what a subgraph looks like, with captures and alternatives.

A pattern is built with ordinary calls, `op.mul(x, op.rsqrt(y))`; `op.<name>` stands for every
overload of `aten.<name>`. How a graph is compared with it is in `matching.py`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


class Pattern:
    """Base of the pattern nodes."""


@dataclass(frozen=True)
class Capture(Pattern):
    """Matches anything of its kind and binds it to a name; the same name must bind the same value."""

    name: str
    kind: str = "any"


@dataclass(frozen=True)
class Call(Pattern):
    """Matches a call of any overload in `targets` whose arguments match."""

    family: str
    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class AnyOf(Pattern):
    """Matches if one of the options does; `tag` is bound to the index of the one that did."""

    options: tuple[Any, ...]
    tag: str | None = None

    @functools.cached_property
    def heads(self) -> tuple[frozenset[Any] | None, ...]:
        """For each option the call targets that it can start with; None where any value can start it."""
        return tuple(_heads(option) for option in self.options)

    def describe(self) -> str:
        """The calls that the options start with, in words."""
        return " or ".join(dict.fromkeys(_families(self)))


@dataclass(frozen=True)
class Named(Pattern):
    """Binds the node matched by `pattern` to a name, so that a rewrite can refer to it."""

    name: str
    pattern: Any


@dataclass(frozen=True)
class Chain(Pattern):
    """Zero or more steps, each around the next, down to `base`. Binds `name` to a tuple of `Step`."""

    name: str
    base: Any
    steps: tuple[tuple[str, Any], ...]


class _Hole(Pattern):
    """Inside a step of a chain: where the rest of the chain goes."""


class _Anything(Pattern):
    """Matches any argument and binds nothing."""


HOLE = _Hole()
ANY = _Anything()


@dataclass(frozen=True)
class Step:
    """One matched step of a chain: which one, the node it ends at, and its captures."""

    tag: str
    node: Node
    captures: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.captures.get(name)


def _heads(pattern: Any) -> frozenset[Any] | None:
    if isinstance(pattern, Call):
        return frozenset(pattern.targets)
    if isinstance(pattern, Named):
        return _heads(pattern.pattern)
    if isinstance(pattern, AnyOf) and None not in pattern.heads:
        return frozenset(t for heads in pattern.heads for t in heads or ())
    return None


def _families(pattern: Any) -> Iterator[str]:
    if isinstance(pattern, Call):
        yield pattern.family
    elif isinstance(pattern, Named):
        yield from _families(pattern.pattern)
    elif isinstance(pattern, AnyOf):
        for option in pattern.options:
            yield from _families(option)


class OpBuilder:
    """`op.<name>(...)` builds a `Call`; ops of other namespaces are reached as `op["effopt.rope"]`."""

    def __getattr__(self, name: str) -> Callable[..., Call]:
        return self[f"aten.{name}"]

    def __getitem__(self, qualified: str) -> Callable[..., Call]:
        targets = family(qualified)

        def build(*args: Any, **kwargs: Any) -> Call:
            return Call(qualified.split(".")[-1], targets, args, tuple(kwargs.items()))

        return build

    def getitem(self, source: Any, index: Any) -> Call:
        """`source[index]` of a call with several results."""
        return Call("getitem", (operator.getitem,), (source, index), ())


_FAMILIES: dict[str, tuple[Any, ...]] = {}


def family(qualified: str) -> tuple[Any, ...]:
    """Every functional overload of `namespace.name`. Raises AttributeError for an op that does not exist."""
    if qualified not in _FAMILIES:
        namespace, name = qualified.split(".", 1)
        packet = getattr(getattr(torch.ops, namespace), name)
        overloads = (getattr(packet, o) for o in packet.overloads())
        _FAMILIES[qualified] = tuple(
            o for o in overloads if not o._schema.is_mutable and "mode" not in o._overloadname
        )
    return _FAMILIES[qualified]


def any_of(*options: Any, tag: str | None = None) -> AnyOf:
    """The first option that leads to a match of the whole pattern."""
    return AnyOf(options, tag)


def number(capture: Any) -> Capture:
    """Restrict a capture to a number known when compiling: a literal, or a constant 0-d tensor."""
    return Capture(capture if isinstance(capture, str) else capture.name, "number")


def tensor(capture: Any) -> Capture:
    """Restrict a capture to a node of the graph."""
    return Capture(capture if isinstance(capture, str) else capture.name, "node")


def parameter(capture: Any) -> Capture:
    """Restrict a capture to an input of the graph or a tensor stored in it: nothing that it computes."""
    return Capture(capture if isinstance(capture, str) else capture.name, "parameter")


def chain(name: str, base: Any, **steps: Any) -> Chain:
    """Peel off `steps` in any order and number until `base` matches."""
    return Chain(name, base, tuple(steps.items()))
