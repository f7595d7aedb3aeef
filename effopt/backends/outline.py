"""Repeated blocks become one subgraph, called N times: the backend compiles it once.

    b0(x) -> b1 -> ... -> bN   =>   invoke_subgraph(block, x, weights_0) -> ... (block, ., weights_N)

`invoke_subgraph` is traced, differentiated, partitioned and lowered once per subgraph. Writes of
mutated inputs stay outside, in the main graph, where Inductor does them in place: inside a subgraph
a cache update would be a copy of the whole cache.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from effopt.graph.analyses.blocks import Run, blocks, operand_groups, operands
from effopt.graph.analyses.gradients import differentiable, reached_by_loss, requires_grad_leaf
from effopt.graph.analyses.symbols import unbound_symbols
from effopt.graph.normalize import is_view, view_base
from effopt.graph.values import val

_aten = torch.ops.aten
_invoke = torch.ops.higher_order.invoke_subgraph

OUTLINED = "effopt_block_"
"""What the identifiers of outlined blocks start with."""


@dataclass(frozen=True)
class Outlined:
    """One repeated block."""

    name: str
    count: int
    nodes: int
    left: str = ""
    """Why its copies stay where they are, each compiled for itself; empty if they were outlined."""


def outline(module: GraphModule, inputs: Sequence[Any], training: bool, refused: str = "") -> list[Outlined]:
    """Outline every repeated block of a lowered graph, in place; say which were left, and why.

    Args:
        module: lowered graph, mutations restored.
        inputs: its real inputs; which of them require gradients matters.
        training: whether a backward pass follows. Copies of a block must then also agree in which
            of their values carry a gradient, since they share one backward graph.
        refused: why the backend takes no subgraphs, if it does not: every block is left, for that.
    """
    graph = module.graph
    _settle_symbols(graph)
    written = [n.args[1] for n in graph.find_nodes(op="call_function", target=_aten.copy_.default)]
    barriers = set(_barriers(graph, written))
    _hoist_attributes(graph)
    _hoist_views(graph)
    _complete_results(graph)
    carrying = differentiable(module, inputs) if training else frozenset()
    # Forward and backward calls of a subgraph are paired by count; a copy behind a detach has no backward.
    # Results that nothing reads do not count: their call has the backward of its other results.
    barriers |= {n for n in carrying - reached_by_loss(graph, carrying) if n.users}
    done: list[Outlined] = []
    for run in blocks(graph, frozenset(barriers), carrying).runs:
        made = _outline_run(module, run, f"block_{len(done)}", carrying, refused)
        if made is not None:
            done.append(made)
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return done


def _barriers(graph: Graph, written: Sequence[Any]) -> list[Node]:
    """Nodes that must stay in the main graph: new values of mutated inputs, writes, foreign regions."""
    found = [n for n in written if isinstance(n, Node)]
    found += [n for n in graph.nodes if n.op == "call_function" and _must_stay(n)]
    return found


def _must_stay(node: Node) -> bool:
    if not isinstance(val(node), (torch.Tensor, tuple, list)):
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if node.target is _aten.lift_fresh_copy.default:
        return True  # reads a real tensor kept in the graph, which a subgraph may not be given
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _settle_symbols(graph: Graph) -> None:
    """Sizes go first: a symbolic size is read from the input that is it, or computed once, early.

    Each layer computes its sizes again; between the layers' calls they would cut every block.
    """
    known: dict[str, Node] = {}
    anchor = next(n for n in graph.nodes if n.op != "placeholder")
    for node in list(graph.nodes):
        size = val(node)
        if not isinstance(size, torch.SymInt) or node.op == "output":
            continue
        earlier = known.get(str(size.node.expr))
        if earlier is not None and node.op == "call_function":
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
            continue
        known[str(size.node.expr)] = node
        if node.op == "call_function" and all(
            n.op == "placeholder" or n < anchor for n in node.all_input_nodes
        ):
            if node is anchor:
                anchor = node.next
            else:
                anchor.prepend(node)


def _hoist_attributes(graph: Graph) -> None:
    """Attribute reads go first, so that a block can take them as operands."""
    anchor = next(n for n in graph.nodes if n.op != "placeholder")
    for node in graph.find_nodes(op="get_attr"):
        if anchor is not node and anchor < node:
            anchor.prepend(node)


def _hoist_views(graph: Graph) -> None:
    """Views go to where the viewed value is made.

    A view that all layers share (`cos.unsqueeze(1)`) is written in the first layer, which would then
    differ from the others. Views of inputs stay: each layer has its own weights.
    """
    latest: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if not is_view(node) or node.args[0].op != "call_function" or len(node.all_input_nodes) != 1:
            continue
        base = node.args[0]
        after = latest.get(base, base)
        if after.next is not node:
            after.append(node)
        latest[base] = node


def _complete_results(graph: Graph) -> None:
    """Every result of a call is taken, in order: a last layer that needs fewer is equal all the same."""
    for node in list(graph.nodes):
        value = val(node)
        if node.op != "call_function" or not isinstance(value, (tuple, list)):
            continue
        taken = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        last = node
        for index in range(len(value)):
            if index not in taken:
                with graph.inserting_after(last):
                    taken[index] = graph.call_function(operator.getitem, (node, index))
                taken[index].meta.update({**node.meta, "val": value[index]})
            elif last.next is not taken[index]:
                last.append(taken[index])
            last = taken[index]


def _outline_run(
    module: GraphModule, run: Run, name: str, carrying: frozenset[Node], refused: str
) -> Outlined | None:
    """Replace the copies of one block by calls of one subgraph."""
    returned = _returned(run)
    if not returned:
        return None
    if refused:
        return Outlined(name, len(run.instances), len(run.instances[0]), refused)
    taken = operand_groups(run)
    if not taken:
        # Ids that are counted out, say. Inductor takes a subgraph's device from its operands (torch 2.13).
        return Outlined(name, len(run.instances), len(run.instances[0]), "it reads no tensor")
    body = _body(run.instances[0], taken, returned, carrying)
    found = Outlined(name, len(run.instances), len(run.instances[0]))
    unbound = unbound_symbols(body.graph)
    if unbound:
        # Given as an operand, the symbol is enough for BLOOM and not for T5 (torch 2.13).
        sizes = ", ".join(sorted(unbound))
        return replace(found, left=f"its operands give {sizes} only as part of another size, or too late")
    digest = hashlib.sha256(repr([str(n.format_node()) for n in body.graph.nodes]).encode()).hexdigest()[:16]
    setattr(module, name, body)
    for instance in run.instances:
        _call(module.graph, instance, name, f"effopt_{name}_{digest}", taken, returned)
    return found


def _returned(run: Run) -> list[int]:
    """Offsets of the values that are read outside in any copy, views replaced by what they view.

    A subgraph must not return a view of its input or of another result; the caller takes the view.
    """
    offsets: set[int] = set()
    for instance in run.instances:
        inside = {n: i for i, n in enumerate(instance)}
        for node in instance:
            if any(user not in inside for user in node.users):
                base = _viewed(node, inside)
                if base in inside:
                    offsets.add(inside[base])
    return sorted(offsets)


def _viewed(node: Node, inside: dict[Node, int]) -> Node:
    while node in inside and (base := view_base(node)) is not None:
        node = base
    return node


def _body(
    instance: Sequence[Node],
    taken: list[list[tuple[int, int]]],
    returned: list[int],
    carrying: frozenset[Node],
) -> GraphModule:
    graph = Graph()
    inputs: dict[Node, Node] = {}
    slots: dict[tuple[int, int], Node] = {}
    for k, group in enumerate(taken):
        i, j = group[0]
        source = operands(instance[i])[j]
        made = graph.placeholder(f"arg_{k}")
        made.meta["val"] = val(source)
        slots.update((slot, made) for slot in group)
    for i, node in enumerate(instance):
        counter = iter(range(len(operands(node))))

        def place(operand: Node, i: int = i, counter: Any = counter) -> Node:
            return slots.get((i, next(counter))) or inputs[operand]

        copied = graph.call_function(node.target, *_mapped(node, place))  # type: ignore[arg-type]
        copied.meta.update(node.meta)
        inputs[node] = copied
    for i in returned:
        # invoke_subgraph reads from here which results carry a gradient.
        meta = inputs[instance[i]].meta
        meta["val"] = meta["example_value"] = requires_grad_leaf(val(instance[i]), instance[i] in carrying)
    graph.output(tuple(inputs[instance[i]] for i in returned))
    return GraphModule({}, graph)


def _mapped(node: Node, place: Any) -> Any:
    return map_arg((node.args, node.kwargs), place)


def _call(
    graph: Graph,
    instance: Sequence[Node],
    name: str,
    identifier: str,
    taken: list[list[tuple[int, int]]],
    returned: list[int],
) -> None:
    """Put one call in place of one copy, and take the views that the subgraph does not return."""
    arguments = [operands(instance[group[0][0]])[group[0][1]] for group in taken]
    inside = {n: i for i, n in enumerate(instance)}
    fresh: dict[Node, Node] = {}
    with graph.inserting_before(instance[0]):
        body = graph.get_attr(name)
        call = graph.call_function(_invoke, (body, identifier, *arguments))
        for k, offset in enumerate(returned):
            item = graph.call_function(operator.getitem, (call, k))
            item.meta.update(instance[offset].meta)
            fresh[instance[offset]] = item
        for node in instance:
            is_taken = node not in fresh and view_base(node) is not None
            if is_taken and any(user not in inside for user in node.users):
                _retake(graph, node, inside, fresh)
    for node, new in fresh.items():
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
    for node in reversed(instance):
        graph.erase_node(node)


def _retake(graph: Graph, node: Node, inside: dict[Node, int], fresh: dict[Node, Node]) -> Node:
    """The view `node` again, of the subgraph's result or of its operand."""
    if node in fresh:
        return fresh[node]
    if node not in inside:
        return node
    source = _retake(graph, node.args[0], inside, fresh)  # type: ignore[arg-type]
    args = map_aggregate(node.args[1:], lambda a: a)
    fresh[node] = graph.call_function(node.target, (source, *args), node.kwargs)  # type: ignore[arg-type]
    fresh[node].meta.update(node.meta)
    return fresh[node]
