"""Outlined blocks written out again, for a backend that failed on their calls.

invoke_subgraph(block, x, weights_0) -> ... (block, ., weights_N)   =>   b0(x) -> b1 -> ... -> bN
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from effopt.backends.outline import OUTLINED

_invoke = torch.ops.higher_order.invoke_subgraph


def write_out(module: GraphModule) -> None:
    """Replace each call of an outlined block by the nodes of the block, in place."""
    for call in module.graph.find_nodes(op="call_function", target=_invoke):
        if str(call.args[1]).startswith(OUTLINED):
            _replace(module, call)
    module.graph.lint()
    module.recompile()


def _replace(module: GraphModule, call: Node) -> None:
    read, _, *operands = call.args
    body = getattr(module, str(read.target))  # type: ignore[union-attr]
    copies = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with module.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "call_function":
                copies[node] = module.graph.node_copy(node, copies.__getitem__)
    results = [copies[result] for result in body.graph.output_node().args[0]]
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
        module.graph.erase_node(item)
    module.graph.erase_node(call)
    if not read.users:  # type: ignore[union-attr]
        module.graph.erase_node(read)  # type: ignore[arg-type]
