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

from effopt.graph.normalize import is_view
from effopt.graph.values import val

_invoke = torch.ops.higher_order.invoke_subgraph


class SettleAliases(CustomGraphPass):
    """Replaces each aliasing result of every `invoke_subgraph` call, before Inductor lowers the graph."""

    def __call__(self, graph: Graph) -> None:
        seen: set[int] = set()
        for call in graph.find_nodes(op="call_function", target=_invoke):
            body = getattr(graph.owning_module, str(call.args[0].target))
            if isinstance(body, GraphModule):
                if id(body) not in seen:
                    seen.add(id(body))
                    _return_bases(body)
                _settle(graph, call, body)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _return_bases(body: GraphModule) -> None:
    """Add to the results each value that several results view and none is: then it can be read outside."""
    (output,) = body.graph.find_nodes(op="output")
    results = list(output.args[0])
    viewed = Counter(_views(r)[1] for r in results if isinstance(r, Node))
    hidden = [b for b, count in viewed.items() if count > 1 and b not in results and b.op != "placeholder"]
    if hidden:
        output.args = ((*results, *hidden),)
        body.recompile()


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
        if isinstance(result, Node) and not is_view(result) and result not in outside:
            if index not in items:
                with graph.inserting_after(last):
                    items[index] = last = graph.call_function(operator.getitem, (call, index))
                last.meta["val"] = val(result)
            outside[result] = items.pop(index)
    for index, item in items.items():
        result = results[index]
        chain, base = _views(result) if isinstance(result, Node) else ([], None)
        if base in outside:
            taken, last = _retake(graph, chain, outside[base], last)
            item.replace_all_uses_with(taken)


def _views(node: Node) -> tuple[list[Node], Node]:
    """The views that lead to `node`, first one first, and the value that they view."""
    chain: list[Node] = []
    while is_view(node):
        chain.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    return chain, node


def _retake(graph: Graph, chain: list[Node], source: Node, last: Node) -> tuple[Node, Node]:
    for view in chain:
        with graph.inserting_after(last):
            made = graph.call_function(view.target, (source, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
        made.meta.update(view.meta)
        source = last = made
    return source, last
