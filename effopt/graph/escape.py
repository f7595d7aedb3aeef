"""Which values leave the graph, and so must keep a storage of their own."""

from __future__ import annotations

from torch.fx import Graph, Node

from effopt.graph.normalize import is_view


def escaping(graph: Graph) -> set[Node]:
    """The nodes whose storage the caller gets: outputs, new values of mutated inputs, and what those view.

    Two of them must not become one tensor, nor one of them an input: the caller may write to it later.
    """
    (output,) = graph.find_nodes(op="output")
    found: set[Node] = set()
    waiting = list(output.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        # Ops that may return their operand are not views by schema; `getitem` reads one result of several.
        if is_view(node) or (node.op == "call_function" and _may_alias(node)):
            waiting.extend(node.all_input_nodes)
    return found


def _may_alias(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name.startswith(
        ("reshape", "contiguous", "getitem", "type_as", "dropout", "feature_dropout", "to.")
    )
