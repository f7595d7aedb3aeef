"""New values of written inputs, made in place: a cache of any length is not copied to write one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from effopt.graph import normalize
from effopt.graph.values import val

_aten = torch.ops.aten
_PARTS = {_aten.slice_scatter.default: _aten.slice.Tensor, _aten.select_scatter.default: _aten.select.int}
"""An op that replaces a part of its operand -> the view of that part."""


def write_in_place(graph: Graph, mutated: Sequence[int]) -> None:
    """For each written input, run the chain of ops from its old to its new value in its own memory.

    Stops at the first op with no in-place form, or whose old value is still read afterwards.

    Args:
        graph: in normal form, new values of `mutated` first among its outputs; edited.
        mutated: positions of the written inputs.
    """
    (output,) = graph.find_nodes(op="output")
    placeholders = list(graph.find_nodes(op="placeholder"))
    position = {node: i for i, node in enumerate(graph.nodes)}
    for index, which in enumerate(mutated):
        old = placeholders[which]
        for node in _chain(old, output.args[0][index]):
            if not _is_last_reader(node, old, position, output):
                break
            _make_in_place(graph, node, old)


def _chain(old: Node, new: Any) -> list[Node]:
    """The ops from `old` to `new`, each with the one before as its first operand; empty if there is none."""
    links = []
    while isinstance(new, Node) and new is not old:
        if _in_place_form(new) is None or not isinstance(new.args[0], Node):
            return []
        links.append(new)
        new = new.args[0]
    return links[::-1]


def _in_place_form(node: Node) -> Any:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target in _PARTS:
        return _PARTS[node.target]
    namespace, name = node.target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    form = getattr(packet, node.target._overloadname or "default", None)
    if form is None or not node.args or len(node.target._schema.returns) != 1:
        return None
    old, new = val(node.args[0]), val(node)
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return None
    is_equal = old.dtype == new.dtype and list(old.shape) == list(new.shape) and old.device == new.device
    names = [[a.name for a in o._schema.arguments] for o in (node.target, form)]
    return form if is_equal and names[0] == names[1] else None


def _is_last_reader(node: Node, old: Node, position: dict[Node, int], output: Node) -> bool:
    """Whether nothing that can read the memory of `old`, other than `node`, runs after `node`."""
    seen, waiting = {old}, [old]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if user is node:
                if current is not old:
                    return False  # the value that is written is read out of the memory that it goes to
                continue
            if user is output or position.get(user, -1) > position[node]:
                return False
            if _may_alias(user) and user not in seen:
                seen.add(user)
                waiting.append(user)
    reads_itself = sum(a is old for a in node.all_input_nodes) and old in _flat(node.args[1:])
    return not reads_itself


def _flat(args: Sequence[Any]) -> list[Any]:
    found = []
    for value in args:
        found.extend(_flat(value) if isinstance(value, (list, tuple)) else [value])
    return found


def _may_alias(user: Node) -> bool:
    """Whether a result can share memory with an operand, declared or not."""
    if not isinstance(user.target, torch._ops.OpOverload):
        return True
    # Composite ops may give back an operand without saying so, as dropout does in evaluation.
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        user.target.name(), "CompositeImplicitAutograd"
    )
    return normalize.is_view(user) or is_composite


def _make_in_place(graph: Graph, node: Node, old: Node) -> None:
    form = _in_place_form(node)
    with graph.inserting_before(node):
        if node.target in _PARTS:
            part = graph.call_function(form, (old, *node.args[2:]), node.kwargs)
            part.meta.update({k: v for k, v in node.meta.items() if k != "val"})
            part.meta["val"] = val(node.args[1])
            made = graph.call_function(_aten.copy_.default, (part, node.args[1]))
        else:
            made = graph.call_function(form, (old, *node.args[1:]), node.kwargs)
    made.meta.update(node.meta)
    node.replace_all_uses_with(old)
    graph.erase_node(node)
