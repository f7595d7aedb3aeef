"""Graph state that is not data - gradient mode, autocast - made explicit, and bookkeeping dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from effopt.errors import CaptureRefused
from effopt.graph.values import fake_call, val

_aten = torch.ops.aten
_SET_GRAD = torch._C._set_grad_enabled
_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast


def is_view(node: Node) -> bool:
    """Whether a node's result aliases its first operand, without writing."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    returned = node.target._schema.returns
    return bool(returned and returned[0].alias_info is not None and not returned[0].alias_info.is_write)


def remove_grad_mode(module: GraphModule, training: bool) -> None:
    """Drop `set_grad_enabled` markers; inside `no_grad` regions, read detached operands instead.

    The results are the same values and, as in the original, carry no gradient.
    """
    enabled = training
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is _SET_GRAD:
            wanted = bool(node.args[0])
            if wanted and not training and torch.is_inference_mode_enabled():
                raise CaptureRefused("enable_grad inside inference mode")
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
            detached.meta.update({k: v for k, v in operand.meta.items() if k != "no_grad"})
            node.replace_input_with(operand, detached)
    node.meta["no_grad"] = True


def make_casts_explicit(module: GraphModule) -> None:
    """Replace autocast, ambient or of a region, by the casts that it makes."""
    markers = [n for n in module.graph.nodes if n.op == "call_function" and n.target is _ENTER_AUTOCAST]
    if markers:
        raise CaptureRefused("an autocast region inside the graph")


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
    """Functional `copy(into, source)` is `source` in the dtype and shape of `into`; copy has no derivative."""
    into, source = val(node.args[0]), node.args[1]
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    if val(source).dtype != into.dtype:
        steps.append((_aten._to_copy.default, (), {"dtype": into.dtype}))
    if list(val(source).shape) != list(into.shape):
        sizes = list(into.shape)
        if any(isinstance(s, torch.SymInt) for s in sizes):
            return
        steps.append((_aten.expand.default, (sizes,), {}))
    current: Any = source
    for target, rest, kwargs in steps:
        with module.graph.inserting_before(node):
            made = module.graph.call_function(target, (current, *rest), kwargs)
        made.meta.update(node.meta)
        made.meta["val"] = fake_call(target, (current, *rest), kwargs)
        current = made
    node.replace_all_uses_with(current)
    module.graph.erase_node(node)
