"""Which layers multiply by a parameter, and which parameter it is, through views and casts."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effopt.graph.provenance import clean_path, layer_of
from effopt.graph.values import shape_of
from effopt.graph.weights import DerivedWeights

_aten = torch.ops.aten
_LAYERS = (_aten.linear.default, _aten.embedding.default)
_STEPS = frozenset(
    {
        _aten.t.default,
        _aten.transpose.int,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.detach.default,
        _aten.alias.default,
        _aten._to_copy.default,
    }
)
_PRODUCT = re.compile(r"(^|_|grouped|add|b)mm(_|$)|matmul|conv|einsum|bilinear")
Step = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]
"""Target, arguments after the tensor, and keyword arguments of one view or cast."""


@dataclass(frozen=True)
class WeightSource:
    """A parameter, and the steps that make an operand of it."""

    parameter: Node
    steps: tuple[Step, ...]
    """In the order in which they run. They hold no node, and so outlive the graph."""

    def describe(self) -> str:
        """The steps as text, equal for equal steps; empty if there are none."""
        return " ".join(f"{target}{args}{kwargs}" for target, args, kwargs in self.steps)

    def then(self, make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """`make` of the operand, as a function of the parameter. It holds no node either."""
        return functools.partial(_made_of, self.steps, make)


def _made_of(steps: Sequence[Step], make: Callable[[Tensor], Any], tensor: Tensor) -> Any:
    for target, args, kwargs in steps:
        tensor = target(tensor, *args, **dict(kwargs))
    return make(tensor)


def weight_source(operand: Any, weights: DerivedWeights) -> WeightSource | None:
    """The parameter that an operand is made of, or None if it is made of anything else as well."""
    steps: list[Step] = []
    while isinstance(operand, Node) and operand.op == "call_function":
        if operand.target not in _STEPS or len(operand.all_input_nodes) != 1:
            return None
        steps.append((operand.target, tuple(operand.args[1:]), tuple(operand.kwargs.items())))
        operand = operand.args[0]
    return WeightSource(operand, tuple(reversed(steps))) if weights.is_weight(operand) else None


def layers_with_weights(
    graph: Graph, weights: DerivedWeights
) -> tuple[dict[Node, str], list[tuple[Node, str]]]:
    """The linear layers and embeddings of a graph, and the products of another kind with a parameter.

    Returns:
        Node -> layer path, or the parameter's name where no module is around it, or where one module has
        several; and (node, what it is) for convolutions, batched and grouped products.
    """
    found, others = {}, []
    sources: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _LAYERS:
            weight = node.args[0 if node.target is _LAYERS[1] else 1]
            source = weight_source(weight, weights)
            found[node] = layer_of(node) or (parameter_path(source.parameter) if source else str(weight))
            if source is not None:
                sources[node] = source.parameter
        elif _PRODUCT.search(_name(node)) and any(_is_matrix(a, weights) for a in node.all_input_nodes):
            others.append((node, _name(node)))
    return {**found, **_several_in_one(found, sources)}, others


def _several_in_one(found: Mapping[Node, str], sources: Mapping[Node, Node]) -> dict[Node, str]:
    """Parameter names for the layers whose path is also that of another parameter."""
    weights: dict[str, set[Node]] = {}
    for node, parameter in sources.items():
        weights.setdefault(found[node], set()).add(parameter)
    return {n: parameter_path(p) for n, p in sources.items() if len(weights[found[n]]) > 1}


def _name(node: Node) -> str:
    target = node.target
    return str(target._schema.name).rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _is_matrix(operand: Node, weights: DerivedWeights) -> bool:
    return len(shape_of(operand)) >= 2 and weight_source(operand, weights) is not None


def parameter_path(node: Node) -> str:
    """The name of the parameter that a placeholder reads, as `named_parameters` spells it."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    name = name() if callable(name) else name
    return clean_path(str(name)) or node.name if name else node.name
