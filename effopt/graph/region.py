"""A piece of a graph by itself: what a rewrite replaces, and what it puts there.

`regions_of` gives both over the same inputs. An operand that only one of the two reads stands for a fact
that the rule knows about the graph around the match, such as a mask that is causal. Its definition is
therefore taken into both regions, so that the fact is computed and not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from effopt.graph.ops.base import bind_schema, hint
from effopt.graph.rewrite import Match, Replacement
from effopt.graph.values import val

_MOST_CONTEXT = 200  # nodes of context around a match; masks of `transformers` are built from 10 to 60
_LOW = (torch.float16, torch.bfloat16, torch.float32)
_HEAVY = frozenset(
    "linear matmul mm bmm addmm baddbmm einsum convolution conv1d conv2d conv3d embedding "
    "scaled_dot_product_attention layer_norm attention attention_lse rms_norm add_rms_norm add_layer_norm "
    "glu rope linear_attention".split()
)


@dataclass(frozen=True)
class Region:
    """Nodes in an order in which they can run, what they read from outside, and what is read of them."""

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]


def regions_of(match: Match, replacement: Replacement, *, deep: bool = False) -> tuple[Region, Region] | None:
    """What is replaced and its replacement, as regions over the same inputs.

    Args:
        match: the match.
        replacement: what the rule emitted for it; still beside the match, in the same graph.
        deep: take in the definitions of all operands, down to matrix products and graph inputs. A rule
            may rest on a fact about an operand that both sides read.

    Returns:
        (before, after), or None if the context is too large to be evaluated.
    """
    old, new = tuple(replacement.outputs), tuple(replacement.outputs.values())
    emitted = set(replacement.emitted)
    reads_before = _operands(match.nodes)
    reads_after = _operands(replacement.emitted, [n for n in new if n not in emitted])
    kept = {n for n in reads_before if n in set(reads_after)}
    wanted = [n for n in (*reads_before, *reads_after) if deep or n not in kept or _is_constant(n)]
    stop = frozenset() if deep else frozenset(n for n in kept if n not in wanted)
    context = _definitions(wanted, stop, frozenset(match.nodes))
    if context is None:
        return None
    before_nodes = tuple(sorted({*context, *match.nodes}))
    after_nodes = (*sorted(context), *replacement.emitted)
    made = {*before_nodes, *after_nodes}
    inputs = tuple(
        n for n in dict.fromkeys((*_operands(before_nodes), *_operands(after_nodes, new))) if n not in made
    )
    return Region(inputs, before_nodes, old), Region(inputs, after_nodes, new)


def _operands(nodes: Iterable[Node], also: Iterable[Node] = ()) -> list[Node]:
    nodes = list(nodes)
    inside = set(nodes)
    return list(dict.fromkeys([a for n in nodes for a in n.all_input_nodes if a not in inside] + list(also)))


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers (dropout with a probability of zero does not)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    probability = dropout_of(node)
    if probability is not None:
        return probability != 0.0
    return torch.Tag.nondeterministic_seeded in target.tags


def dropout_of(node: Node) -> float | None:
    """The dropout probability of a call; None if it has no such argument, 0.0 outside training."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = _dropout_argument(target)
    if name is None:
        return None
    bound = bind_schema(target, node.args, node.kwargs)
    return float(bound[name]) if bound.get("train", True) is not False else 0.0


def _dropout_argument(target: torch._ops.OpOverload) -> str | None:
    names = [a.name for a in target._schema.arguments]
    if "dropout_p" in names:
        return "dropout_p"
    return "p" if "p" in names and "dropout" in target._schema.name else None


def _is_heavy(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target._schema.name.split("::")[1] in _HEAVY or is_random(node)


def _is_leaf(node: Node) -> bool:
    return node.op != "call_function" or not isinstance(val(node), (torch.Tensor, tuple, list))


def _is_constant(node: Node) -> bool:
    """Whether a node's value follows from sizes and literals alone: it can be computed, not sampled."""
    seen, pending = {node}, [node]
    while pending:
        current = pending.pop()
        if current.op == "placeholder" and isinstance(val(current), torch.Tensor):
            return False
        if current.op == "get_attr" and "_tensor_constant" not in str(current.target):
            return False
        if _is_heavy(current) or len(seen) > _MOST_CONTEXT:
            return False
        fresh = [a for a in current.all_input_nodes if a not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return isinstance(val(node), torch.Tensor) and node.op == "call_function"


def _definitions(wanted: Sequence[Node], stop: frozenset[Node], inside: frozenset[Node]) -> list[Node] | None:
    found: set[Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node in found or node in stop or _is_leaf(node) or (_is_heavy(node) and node not in inside):
            continue
        found.add(node)
        if len(found) > _MOST_CONTEXT:
            return None
        pending.extend(node.all_input_nodes)
    return sorted(found)


def evaluate(region: Region, inputs: Sequence[Any], *, raised: bool = False) -> tuple[Any, ...]:
    """Run a region on values for its inputs, dropout off.

    Args:
        region: what to run.
        inputs: one value for each of `region.inputs`.
        raised: compute in float64: dtype constants are raised too. `inputs` must be float64 already.
    """
    env: dict[Node, Any] = dict(zip(region.inputs, inputs, strict=True))
    for node in region.nodes:
        if node in env:
            continue
        args, kwargs = _without_dropout(node)
        args, kwargs = map_arg((args, kwargs), env.__getitem__)
        if raised:
            args, kwargs = _raise_dtypes(args), _raise_dtypes(kwargs)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        env[node] = raise_values(result) if raised else result
    return tuple(env[n] for n in region.outputs)


def _without_dropout(node: Node) -> tuple[Any, Any]:
    target = node.target
    name = _dropout_argument(target) if isinstance(target, torch._ops.OpOverload) else None
    if name is None or not isinstance(target, torch._ops.OpOverload):
        return node.args, node.kwargs
    names = [a.name for a in target._schema.arguments]
    args, kwargs = list(node.args), dict(node.kwargs)
    if names.index(name) < len(args):
        args[names.index(name)] = 0.0
    elif name in kwargs:
        kwargs[name] = 0.0
    return tuple(args), kwargs


def _raise_dtypes(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _raise_dtypes(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_raise_dtypes(v) for v in value)
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOW else value


def raise_values(value: Any) -> Any:
    """The same nest of values with every floating tensor in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in _LOW else value
    if isinstance(value, (list, tuple)):
        return type(value)(raise_values(v) for v in value)
    return value


def class_of(before: Region, after: Region) -> tuple[Any, ...]:
    """A hashable key that two rewrites share if their regions are isomorphic.

    It holds the targets, constants and wiring of both regions, and dtype, sizes, strides and device of
    their inputs. Symbols count by name.
    """
    number: dict[Node, int] = {}
    described: list[Any] = []
    for node in before.inputs:
        number[node] = len(number)
        described.append(_describe(node))
    for part in (before, after):
        for node in part.nodes:
            if node not in number:
                number[node] = len(number)
                described.append(
                    (node.target, _structure(node.args, number), _structure(node.kwargs, number))
                )
        described.append(tuple(number[n] for n in part.outputs))
    return tuple(described)


def _describe(node: Node) -> Any:
    value = val(node)
    if isinstance(value, torch.Tensor):
        sizes = tuple(str(s) for s in value.shape) + tuple(str(s) for s in value.stride())
        # A stored literal is part of the computation; anything else is sampled.
        literal = str(stored(node)) if node.op == "get_attr" else ""
        return (value.dtype, sizes, tuple(hint(s) for s in value.shape), str(value.device), literal)
    return (type(value).__name__, str(value))


def _structure(value: Any, number: Mapping[Node, int]) -> Any:
    if isinstance(value, Node):
        return ("node", number[value])
    if isinstance(value, dict):
        return tuple((k, _structure(v, number)) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_structure(v, number) for v in value)
    # 1 and 1.0 and True are equal keys, and different arguments.
    return (type(value).__name__, str(value))


def stored(node: Node) -> Any:
    """The tensor or module that a `get_attr` node reads; None if it is not there."""
    held: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        held = getattr(held, part, None)
    return held


def to_module(region: Region) -> GraphModule:
    """A region as a module of its own: inputs in order, outputs as a tuple."""
    graph, copies = Graph(), {}
    for node in region.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in region.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in region.outputs))
    return GraphModule(torch.nn.Module(), graph)


def work_flops(region: Region, size: Callable[[Any], int] = hint) -> float:
    """A rough count of floating-point operations: products exactly, ten for each element of the rest."""
    total = 0.0
    for node in region.nodes:
        results = val(node) if isinstance(val(node), (tuple, list)) else (val(node),)
        elements = sum(_count(r, size) for r in results if isinstance(r, torch.Tensor))
        operands = [val(a) for a in node.all_input_nodes if isinstance(val(a), torch.Tensor)]
        if _is_heavy(node) and operands:
            # The contracted size of a product is a size of its operands; attention has two products.
            widest = max((size(s) for o in operands for s in o.shape[-2:]), default=1)
            total += 4.0 * elements * widest
        total += 10.0 * max([elements, *(_count(o, size) for o in operands)])
    return total


def _count(value: torch.Tensor, size: Callable[[Any], int]) -> int:
    count = 1
    for s in value.shape:
        count *= size(s)
    return count
