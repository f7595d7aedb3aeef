"""Compute each value once.

    f(x), f(x)  =>  y = f(x); y, y

Exact. Left alone: random draws (two are two), calls that write, and two values that both leave the
graph, for the caller may write to one of them. Inference and training. Saves the repeated calls.
Source: Aho, Lam, Sethi & Ullman 2006, Compilers, section 9.1.4.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from effopt.graph.escape import escaping
from effopt.graph.ops.base import bind_schema
from effopt.graph.rewrite import PassResult
from effopt.passes.base import Context, Example, GraphPass, Stage


@dataclass(frozen=True)
class EliminateCommonSubexpressions(GraphPass):
    """A graph pass, for no pattern can say that two calls anywhere are equal."""

    name: ClassVar[str] = "eliminate-common-subexpressions"
    stage: ClassVar[Stage] = Stage.CLEANUP

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Merge each call into an equal earlier one."""
        result = PassResult()
        leaving = escaping(module.graph)
        first: dict[Hashable, Node] = {}
        for node in list(module.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            earlier = first.setdefault(key, node)
            if earlier is node:
                continue
            if node in leaving and earlier in leaving:
                result.reject(self.name, node, f"it and {earlier.name}, its equal, both leave the graph")
                continue
            result.apply(self.name, str(node.target), node, f"is {earlier.name}")
            node.replace_all_uses_with(earlier)
            module.graph.erase_node(node)
            if node in leaving:
                leaving.add(earlier)
        return result

    def samples(self) -> Iterable[Example]:
        x = torch.randn(3, 4)
        yield Example(lambda x: (x.cos() + 1) * (x.cos() + 1), (x,))
        yield Example(lambda x: torch.softmax(x, -1) - x.softmax(dim=-1), (x,))

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(3, 4)
        yield Example(lambda x: (x.cos(), x.cos()), (x,), "both leave the graph")


def _key(node: Node) -> Hashable | None:
    """What makes two calls equal; None for a call that must stay its own."""
    target = node.target
    if node.op != "call_function" or (node.is_impure() and target is not operator.getitem):
        return None
    if isinstance(target, torch._ops.OpOverload):
        bound = bind_schema(target, node.args, node.kwargs)
        if target._schema.is_mutable or _is_random(target, bound):
            return None
        arguments: Any = tuple(bound.values())
    elif target is operator.getitem:
        arguments = node.args
    else:
        return None
    try:
        key = (target, _freeze(arguments))
        hash(key)
    except TypeError:
        return None
    return key


def _is_random(target: torch._ops.OpOverload, bound: dict[str, Any]) -> bool:
    return torch.Tag.nondeterministic_seeded in target.tags or bool(bound.get("dropout_p"))


def _freeze(value: Any) -> Hashable:
    """Hashable, and equal only for what is the same argument: 1, 1.0 and True differ, as do 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, float):
        return "float", value.hex()
    if isinstance(value, torch.SymInt):
        raise TypeError("a symbol has no hash")
    return value if isinstance(value, Node) else (type(value), value)
