"""Negative mutants: look-alikes of a graph, each one change away from it.

A rule may refuse a mutant or rewrite it rightly. One that rewrites it to something else did not look at
what was changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from effopt.graph.values import fake_call, val
from effopt.testing.trial import Trial, without_torch_messages

_DIM = frozenset({"dim", "dim0", "dim1", "dims", "axis"})


def mutants(trial: Trial, refused: list[str] | None = None) -> Iterator[tuple[str, Trial]]:
    """(what was changed, the changed trial) for each change after which the graph still runs.

    Args:
        trial: left as it is.
        refused: gets the other changes, each with what they broke.
    """
    count = len(list(trial.module.graph.nodes))
    for position in range(count):
        original = _at(trial.module, position)
        for words, arguments in _changes(original):
            made = trial.copy()
            node = _at(made.module, position)
            # The changed arguments refer to nodes of the original graph.
            there = dict(zip(trial.module.graph.nodes, made.module.graph.nodes, strict=True))
            node.args = map_arg(arguments, there.__getitem__)
            change, broken = f"{original.name} ({original.target}): {words}", _refresh(made.module)
            if not broken:
                yield change, made
            elif refused is not None:
                refused.append(f"{change}: {broken}")


def _at(module: GraphModule, position: int) -> Node:
    node: Node = list(module.graph.nodes)[position]
    return node


def _changes(node: Node) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(words, new positional arguments) of each change to one call."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    names = [a.name for a in node.target._schema.arguments]
    for index, value in enumerate(node.args):
        for changed in _changed(value, names[index], node):
            args = (*node.args[:index], changed, *node.args[index + 1 :])
            yield f"{names[index]} is {changed} instead of {value}", args
    first = node.args[:2]
    if len(first) == 2 and all(isinstance(a, Node) and isinstance(val(a), Tensor) for a in first):
        yield "operands exchanged", (first[1], first[0], *node.args[2:])


def _changed(value: Any, name: str, node: Node) -> Iterator[Any]:
    operand = val(node.args[0]) if node.args else None
    rank = operand.dim() if isinstance(operand, Tensor) else 0
    if name in _DIM and rank > 1:
        if type(value) is int:
            yield (value + 1) % rank
        elif isinstance(value, (list, tuple)) and len(value) == rank:
            yield [*value[1:], value[0]]
            yield [value[1], value[0], *value[2:]]
        elif isinstance(value, (list, tuple)):
            yield [(d + 1) % rank for d in value]
    elif type(value) is float:
        yield value * 1.5 + 0.125
        yield -value
    elif type(value) is bool:
        yield not value
    elif type(value) is int:
        yield value + 1
    elif name == "equation" and "->" in value and len(value.partition("->")[2]) > 1:
        yield f"{value[:-2]}{value[-1]}{value[-2]}"


def _refresh(module: GraphModule) -> str:
    """Evaluate fake values again; which call no longer accepts its operands, if one does not."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            with without_torch_messages():
                # `arange` has no operand to take the fake mode from.
                node.meta["val"] = fake_call(node.target, node.args, node.kwargs, node)
        except Exception as error:  # noqa: BLE001 - the change is not possible: no mutant
            return f"{node.target}: {str(error).strip().partition(chr(10))[0]}"
    module.recompile()
    return ""
