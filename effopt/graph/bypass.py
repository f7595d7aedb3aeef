"""Leaving layers out of a graph: what `skip-layers` and `drop-layers` do once they have decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Graph, Node

from effopt.graph.analyses.layers import Layer, Stack, attention_of
from effopt.graph.analyses.stream import Ancestry
from effopt.graph.provenance import layer_of
from effopt.graph.rewrite import PassResult


def bypass(pass_name: str, stack: Stack, decisions: Sequence[Any], graph: Graph, result: PassResult) -> None:
    """Read the entry of each layer with a decision wherever its exit was read; erase what that leaves dead.

    A layer's random draws go with it, as in a model without the layer.
    """
    chosen = [layer for layer, decision in zip(stack.layers, decisions, strict=True) if decision is not None]
    ancestry = Ancestry(graph)
    # What nothing read before is there for its effect, and stays.
    was_read = {node for node in graph.nodes if node.users}
    # Erased nodes forget what they read.
    keys = {layer.exit: [a for n in attention_of(layer) for a in n.all_input_nodes[1:3]] for layer in chosen}
    entries: dict[Node, Node] = {}
    for layer in chosen:
        entries[layer.exit] = entries.get(layer.entry, layer.entry)
        layer.exit.replace_all_uses_with(entries[layer.exit])
    for node in reversed(graph.nodes):
        if node in was_read and not node.users and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)
    alive = set(graph.nodes)
    for layer in chosen:
        left = [n for n in layer.nodes if n in alive and ancestry.depends(n, layer.entry)]
        result.apply(pass_name, "identity", layer.exit, _note(layer, left, keys[layer.exit], ancestry))


def all_but_one(pass_name: str, stack: Stack, asked: Mapping[str, Any], result: PassResult) -> Sequence[Any]:
    """The decision asked for each layer by its path, if one layer stays; else the first one stays."""
    decisions = [asked.get(layer.path) for layer in stack.layers]
    if all(decision is not None for decision in decisions):
        first = stack.layers[0]
        result.reject(pass_name, first.exit, f"{first.path} stays: nothing would be left of its stack")
        decisions[0] = None
    return decisions


def _note(layer: Layer, left: Sequence[Node], keys: Sequence[Node], ancestry: Ancestry) -> str:
    """Which layer it was, if its module does not say so, and what of it still runs."""
    name = "" if layer_of(layer.exit).startswith(layer.path) else layer.path
    is_cached = any(ancestry.depends(key, node) for key in keys for node in left)
    is_cached = is_cached and not any(node in left for node in attention_of(layer))
    if is_cached:
        rest = "its cache is still written: pass past_key_values=effopt.cache_for(model, plan)"
    elif left:
        rest = f"{len(left)} of its {len(layer.nodes)} nodes still run, for what else reads them"
    else:
        rest = ""
    return ": ".join(part for part in (name, rest) if part)
