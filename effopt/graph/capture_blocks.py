"""Equal blocks of a Dynamo graph are brought to normal form once, and copied.

Tracing costs the same for every layer, so a deep model pays for each of its equal layers. Here the
repeated blocks are cut out: one copy is traced as a graph of its own, the rest of the model is traced
with the blocks' results as inputs and their operands as outputs, and the pieces are put together in
program order. The result is the graph that tracing everything gives, node for node.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from effopt.graph.analyses.blocks import Run, blocks, operand_groups, operands, results
from effopt.graph.capture_join import POSITION, Piece, join
from effopt.graph.values import val

Export = Callable[[GraphModule, list[Any]], tuple[GraphModule, Any]]

_LEAST_SAVED = 40  # nodes; below that, two traces cost more than one


def export_in_blocks(
    module: GraphModule, inputs: Sequence[Any], export: Export
) -> tuple[GraphModule, Any] | None:
    """Trace `module` with its equal blocks traced once.

    Args:
        module: Dynamo's graph. Only read, but for `val`, which is added to its nodes' metadata.
        inputs: its inputs.
        export: traces a graph functionally: (module, inputs) -> (graph, signature).

    Returns:
        What `export(module, inputs)` would return; None if there is nothing to gain, or if an operand
        or a result of a block is written in place anywhere: which of its values a block reads depends
        on when, and the pieces are put together by value. None as well if tracing a copy guards one of
        its symbolic numbers.
    """
    calls = [n for n in module.graph.nodes if n.op in ("call_function", "call_method")]
    for node in module.graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    numbers = {**_computed_numbers(calls), **_given_numbers(calls)}
    barriers = frozenset(n for n in calls if n not in numbers and not _is_plain(n))
    carrying = frozenset(n for n in calls if isinstance(val(n), torch.Tensor) and val(n).requires_grad)
    runs = [
        r for r in blocks(module.graph, barriers, carrying, numbers).runs if r.saved_nodes >= _LEAST_SAVED
    ]
    if not runs:
        return None
    if any(_is_written(source) for run in runs for source in _sources(run)):
        return None
    for position, node in enumerate(module.graph.nodes):
        node.meta["custom"] = {**node.meta.get("custom", {}), POSITION: position}
    pieces = []
    for run in runs:
        groups, returned = operand_groups(run), results(run)
        given, fakes = _body(module, run.instances[0], groups, returned)
        with _watched(fakes) as settled:
            body, signature = export(given, fakes)
        if settled or signature.user_inputs_to_mutate or signature.buffers_to_mutate:
            return None
        pieces.append(Piece(run, groups, returned, body))
    outer_module, fakes = _outer(module, pieces)
    outer, signature = export(outer_module, [*inputs, *fakes])
    placeholders = [n.name for n in outer.graph.find_nodes(op="placeholder")]
    if any(name in placeholders[len(inputs) :] for name in signature.user_inputs_to_mutate.values()):
        return None
    return join(module, outer, pieces, len(inputs), len(signature.user_inputs_to_mutate)), signature


@contextmanager
def _watched(fakes: Sequence[Any]) -> Iterator[list[Any]]:
    """Takes note of guards on the numbers of the copy that is traced: the other copies' numbers have none."""
    numbers = [fake.node for fake in fakes if isinstance(fake, torch.SymFloat)]
    symbols = {symbol for number in numbers for symbol in number.expr.free_symbols}
    before = len(numbers[0].shape_env.guards) if numbers else 0
    settled: list[Any] = []
    yield settled
    if numbers:
        new = numbers[0].shape_env.guards[before:]
        settled += [guard.expr for guard in new if symbols & guard.expr.free_symbols]


def _is_plain(node: Node) -> bool:
    """A call that computes tensors, or fills one: no change of global state, no number, no foreign region."""
    value = val(node)
    if node.target is operator.setitem:
        return True  # a block that fills a tensor of its own is functional; of others, it is refused below
    if isinstance(value, torch.Size):
        return all(user.target is not operator.getitem for user in node.users)  # a shape, used as a whole
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(t, torch.Tensor) for t in tensors) and not isinstance(
        node.target, torch._ops.HigherOrderOperator
    )


def _given_numbers(calls: Sequence[Node]) -> dict[Node, Any]:
    """The float attributes of the model, which `dynamic=True` makes inputs that are read with `item()`.

    Each with what is known of it: its present value, and what the program asked of it so far. Where that
    is the same for two layers, so is what tracing makes of them, and the guards that it stands on.
    """
    found = {n: val(n).node for n in calls if _is_given_number(n)}
    asked: dict[str, list[str]] = {str(number.expr): [] for number in found.values()}
    for guard in next(iter(found.values())).shape_env.guards if found else ():
        for symbol in map(str, guard.expr.free_symbols):
            if symbol in asked:
                asked[symbol].append(re.sub(rf"\b{symbol}\b", "it", str(guard.expr)))
    return {
        node: (number.hint, number.expr.is_number, sorted(asked[str(number.expr)]))
        for node, number in found.items()
    }


def _computed_numbers(calls: Sequence[Node]) -> dict[Node, Any]:
    """Numbers that are computed from the sizes and numbers of the inputs, with the formula.

    Layers that read numbers of one formula, in the same symbols, read the same number.
    """
    found = {n: str(val(n).node.expr) for n in calls if isinstance(val(n), (torch.SymInt, torch.SymFloat))}
    return {n: formula for n, formula in found.items() if _is_settled_by_inputs(n)}


def _is_settled_by_inputs(node: Node) -> bool:
    takes_apart = any(isinstance(val(a), (tuple, list)) for a in node.all_input_nodes)
    return not takes_apart and not free_unbacked_symbols(val(node))


def _is_given_number(node: Node) -> bool:
    sources = node.all_input_nodes
    is_read = node.target == "item" and len(sources) == 1 and sources[0].op == "placeholder"
    return is_read and isinstance(val(node), torch.SymFloat) and val(node).node.hint is not None


def _sources(run: Run) -> Iterator[Node]:
    """What the copies of a block read from outside."""
    for instance in run.instances:
        inside = set(instance)
        yield from (s for node in instance for s in operands(node) if s not in inside)


def _is_written(node: Node) -> bool:
    """Whether a value is written in place, itself or through a view: Dynamo's fake tensor counted it."""
    value = val(node)
    if not isinstance(value, torch.Tensor):
        return False
    return value.is_inference() or value._version > 0


def _fake(node: Node) -> Any:
    value = val(node)
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _body(
    module: GraphModule, instance: Sequence[Node], groups: list[list[tuple[int, int]]], returned: list[int]
) -> tuple[GraphModule, list[Any]]:
    graph, env, fakes = Graph(), dict[Node, Node](), list[Any]()
    for k, (i, j) in enumerate(group[0] for group in groups):
        source = operands(instance[i])[j]
        fakes.append(_fake(source))
        # Two operands may be one node in this copy, and not in another: each has a placeholder.
        env[source] = graph.placeholder(f"operand_{k}")
    slots = {slot: k for k, group in enumerate(groups) for slot in group}
    parameters = list(graph.find_nodes(op="placeholder"))
    for i, node in enumerate(instance):
        index = iter(range(len(operands(node))))

        def place(operand: Node, i: int = i, index: Iterator[int] = index) -> Node:
            slot = (i, next(index))
            return parameters[slots[slot]] if slot in slots else env[operand]

        args, kwargs = map_arg((node.args, node.kwargs), place)
        env[node] = graph.create_node(node.op, node.target, args, kwargs)
        env[node].meta = dict(node.meta)
    graph.output(tuple(env[instance[i]] for i in returned))
    return GraphModule(module, graph), fakes


def _outer(module: GraphModule, pieces: list[Piece]) -> tuple[GraphModule, list[Any]]:
    """The graph without the blocks: their results are inputs, their operands are outputs."""
    graph, env, fakes = Graph(), dict[Node, Node](), list[Any]()
    inside = {n for piece in pieces for instance in piece.run.instances for n in instance}
    for node in module.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node)
    count = len(env)
    for piece in pieces:
        piece.first_input = count + len(fakes)
        for instance in piece.run.instances:
            for offset in piece.returned:
                env[instance[offset]] = graph.placeholder(f"result_{len(fakes)}")
                fakes.append(_fake(instance[offset]))
    for node in module.graph.nodes:
        if node not in inside and node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, lambda n: env[n])
    (output,) = module.graph.find_nodes(op="output")
    values = [*map_arg(output.args[0], lambda n: env[n])]
    for piece in pieces:
        piece.first_output = len(values)
        for instance in piece.run.instances:
            values += [env[operands(instance[group[0][0]])[group[0][1]]] for group in piece.groups]
    graph.output(tuple(values))
    return GraphModule(module, graph), fakes
