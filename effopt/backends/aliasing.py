"""Results of a subgraph that alias its operands, read from the operands instead.

Partitioned for training, a subgraph returns activations for the backward pass, among them its own
inputs and views of other results. Inductor plans memory as if every result of a call were a buffer
of its own, so it reuses a buffer that a saved alias still shows: wrong gradients, on torch 2.13 also
for `torch._dynamo.config.use_graph_deduplication` (`benchmarks/compile_time.py --train` shows it). Read
from the operand, the alias is known to the planner.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from effopt.graph.normalize import view_base
from effopt.graph.values import val

_invoke = torch.ops.higher_order.invoke_subgraph


class SettleAliases(CustomGraphPass):
    """Replaces each aliasing result of every `invoke_subgraph` call, before Inductor lowers the graph."""

    def __call__(self, graph: Graph) -> None:
        added: dict[GraphModule, list[Node]] = {}
        for call in graph.find_nodes(op="call_function", target=_invoke):
            body = getattr(graph.owning_module, str(call.args[0].target))
            if isinstance(body, GraphModule):
                if body not in added:
                    added[body] = _return_bases(body)
                if added[body]:
                    _widen(call, added[body])
                _settle(graph, call, body)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _return_bases(body: GraphModule) -> list[Node]:
    """Add to the results each value that results view and none is: then it can be read outside. Gives those.

    A single view of the whole value may stay: it takes the value's place. A part of one may not, since
    Inductor would reuse memory of the part's extent, in which the rest of the value lies.
    """
    (output,) = body.graph.find_nodes(op="output")
    results = list(output.args[0])
    views = [(r, _views(r)[1]) for r in results if isinstance(r, Node)]
    viewed = Counter(base for _, base in views)
    partly = {base for r, base in views if not _is_whole(r, base)}
    hidden = [
        b
        for b, count in viewed.items()
        if (count > 1 or b in partly) and b not in results and b.op != "placeholder"
    ]
    if hidden:
        output.args = ((*results, *hidden),)
        body.recompile()
    return hidden


def _widen(call: Node, added: list[Node]) -> None:
    """Say of a call that its body has more results.

    Fake results of subgraphs are cached by the body and the identifier, and Inductor may run a call anew on
    fake values: under the old identifier it would have the fewer results of before (torch 2.13).
    """
    body, identifier, *operands = call.args
    call.args = (body, f"{identifier}_with_bases", *operands)
    fresh = (val(base).new_empty_strided(val(base).size(), val(base).stride()) for base in added)
    call.meta["val"] = (*val(call), *fresh)


def _is_whole(view: Node, base: Node) -> bool:
    return view is base or statically_known_true(val(view).numel() == val(base).numel())


def _settle(graph: Graph, call: Node, body: GraphModule) -> None:
    items: dict[Any, Node] = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    parameters = list(body.graph.find_nodes(op="placeholder"))
    # Where each value of the body is available outside: an operand, or the first result that is it.
    outside: dict[Node, Node] = {
        p: a for p, a in zip(parameters, call.args[2:], strict=True) if isinstance(a, Node)
    }
    (output,) = body.graph.find_nodes(op="output")
    results = list(output.args[0])
    last = max([call, *items.values()])
    for index, result in enumerate(results):
        is_tensor = isinstance(result, Node) and isinstance(val(result), torch.Tensor)
        if is_tensor and view_base(result) is None and result not in outside:
            if index not in items:
                with graph.inserting_after(last):
                    items[index] = last = graph.call_function(operator.getitem, (call, index))
                last.meta["val"] = val(call)[index]
            outside[result] = items.pop(index)
    for index, item in items.items():
        result = results[index]
        chain, base = _views(result) if isinstance(result, Node) else ([], None)
        if base in outside:
            taken, last = _retake(graph, chain, outside[base], last, outside)
            item.replace_all_uses_with(taken)


def _views(node: Node) -> tuple[list[Node], Node]:
    """The views that lead to `node`, first one first, and the value that they view."""
    chain: list[Node] = []
    while (base := view_base(node)) is not None:
        chain.insert(0, node)
        if node.target is operator.getitem:  # one result of a split
            chain.insert(0, node.args[0])  # type: ignore[arg-type]
        node = base
    return chain, node


def _retake(
    graph: Graph, chain: list[Node], source: Node, last: Node, outside: dict[Node, Node]
) -> tuple[Node, Node]:
    """The views `chain` of `source`, written after `last`; returns the final one and the new `last`."""
    for view in chain:
        last = _bring_sizes(graph, view, last, outside)
        args = map_arg(view.args[1:], outside.__getitem__)
        with graph.inserting_after(last):
            made = graph.call_function(view.target, (source, *args), view.kwargs)  # type: ignore[arg-type]
        made.meta.update(view.meta)
        source = last = made
    return source, last


def _bring_sizes(graph: Graph, node: Node, last: Node, outside: dict[Node, Node]) -> Node:
    """Have the symbolic sizes that a view reads outside of the body as well: an input's, or computed."""
    given = {
        val(n).node.expr: n for n in graph.find_nodes(op="placeholder") if isinstance(val(n), torch.SymInt)
    }
    for size in node.all_input_nodes:
        if size in outside or not isinstance(val(size), torch.SymInt):
            continue
        if val(size).node.expr in given:
            outside[size] = given[val(size).node.expr]
            continue
        last = _bring_sizes(graph, size, last, outside)
        with graph.inserting_after(last):
            made = graph.node_copy(size, outside.__getitem__)
        outside[size] = last = made
    return last
