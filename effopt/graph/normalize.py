"""Gradient mode made explicit, and bookkeeping dropped. (Autocast: `graph/autocast.py`.)"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from effopt.errors import CaptureRefused
from effopt.graph.values import fake_call, val

_aten = torch.ops.aten
GETITEM = operator.getitem
_SET_GRAD = torch._C._set_grad_enabled


def is_view(node: Node) -> bool:
    """Whether a node's result aliases its first operand, without writing."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    returned = node.target._schema.returns
    return bool(returned and returned[0].alias_info is not None and not returned[0].alias_info.is_write)


def view_base(node: Node) -> Node | None:
    """What a node is a view of: its operand, through one result of a split too; None if it is no view."""
    source = node.args[0] if node.target is GETITEM else node
    if isinstance(source, Node) and is_view(source) and isinstance(source.args[0], Node):
        return source.args[0]
    return None


def view_root(node: Node) -> Node:
    """The node whose memory `node` reads, through any number of views."""
    while (base := view_base(node)) is not None:
        node = base
    return node


def remove_grad_mode(module: GraphModule, training: bool, asks_for_gradient: bool) -> None:
    """Drop `set_grad_enabled` markers; inside `no_grad` regions, read detached operands instead.

    The results are the same values and, as in the original, carry no gradient.

    Args:
        module: edited.
        training: whether the call runs with autograd and an input asks for a gradient.
        asks_for_gradient: whether some input does, autograd or not.

    Raises:
        CaptureRefused: `enable_grad` where the call itself runs without autograd.
    """
    enabled = training
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is _SET_GRAD:
            wanted = bool(node.args[0])
            if wanted and asks_for_gradient and not torch.is_grad_enabled():
                raise CaptureRefused("an enable_grad region in a call that runs without autograd")
            enabled = training and wanted
            module.graph.erase_node(node)
        elif training and not enabled and node.op == "call_function":
            _detach_operands(module, node)


def _detach_operands(module: GraphModule, node: Node) -> None:
    for operand in node.all_input_nodes:
        value = val(operand)
        is_leaf = operand.op in ("placeholder", "get_attr") or "no_grad" not in operand.meta
        if is_leaf and isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            with module.graph.inserting_before(node):
                detached = module.graph.call_function(_aten.detach.default, (operand,))
            reader = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
            detached.meta.update(reader | {k: v for k, v in operand.meta.items() if k != "no_grad"})
            node.replace_input_with(operand, detached)
    node.meta["no_grad"] = True


def drop_bookkeeping(module: GraphModule, training: bool) -> None:
    """Remove nodes that compute nothing: metadata assertions, aliases, detaches without autograd."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is _aten.alias.default or (node.target is _aten.detach.default and not training):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _aten.copy.default:
            _spell_copy(module, node)
    module.recompile()


def _spell_copy(module: GraphModule, node: Node) -> None:
    """Functional `copy(into, source)` is `source` in dtype and shape of `into`; copy has no derivative."""
    into, source = val(node.args[0]), node.args[1]
    sizes = list(into.shape)
    is_expanded = list(val(source).shape) != sizes
    if is_expanded and any(isinstance(s, torch.SymInt) for s in sizes):
        return
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    if is_expanded:
        steps.append((_aten.expand.default, (sizes,), {}))
    if val(source).dtype != into.dtype or val(source).device != into.device:
        steps.append((_aten._to_copy.default, (), {"dtype": into.dtype, "device": into.device}))
    else:
        # A copy even where nothing changes: what was copied must not alias its source.
        steps.append((_aten.clone.default, (), {}))
    current: Any = source
    for target, rest, kwargs in steps:
        with module.graph.inserting_before(node):
            made = module.graph.call_function(target, (current, *rest), kwargs)
        made.meta.update(node.meta)
        made.meta["val"] = fake_call(target, (current, *rest), kwargs)
        current = made
    node.replace_all_uses_with(current)
    module.graph.erase_node(node)
