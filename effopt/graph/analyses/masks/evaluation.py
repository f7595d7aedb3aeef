"""The value of a mask that depends on no input."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effopt.graph.values import val

_MOST_ELEMENTS = 1 << 22
_MOST_NODES = 64


def evaluate(node: Node) -> torch.Tensor | None:
    """The value of a node that depends on no input; None if it does, or if it is too large to compute."""
    order = _ancestors(node)
    if order is None:
        return None
    known: dict[Node, Any] = {}
    with torch.no_grad():
        for n in order:
            if n.op == "get_attr":
                known[n] = _literal(n)
                if known[n] is None:
                    return None
                continue
            args, kwargs = torch.fx.node.map_arg((n.args, dict(n.kwargs)), lambda a: known[a])
            kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
            known[n] = n.target(*args, **kwargs)  # type: ignore[operator]
    result = known[node]
    return result if isinstance(result, torch.Tensor) else None


def _literal(node: Node) -> torch.Tensor | None:
    held = getattr(node.graph.owning_module, str(node.target), None)
    literal = "_tensor_constant" in str(node.target) and isinstance(held, torch.Tensor)
    if not literal or isinstance(held, torch._subclasses.FakeTensor):
        return None
    return held.cpu() if isinstance(held, torch.Tensor) else None


def _ancestors(node: Node) -> list[Node] | None:
    """What `node` is computed from, in order; None if that holds an input, randomness or large tensors."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        n = waiting.pop()
        if n in found:
            continue
        if n.op not in ("call_function", "get_attr") or len(found) == _MOST_NODES or not _is_plain(n):
            return None
        found[n] = None
        waiting.extend(n.all_input_nodes)
    return sorted(found)


def _is_plain(node: Node) -> bool:
    value = val(node)
    if node.op == "get_attr":
        return True
    random = (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )
    if random or not isinstance(node.target, torch._ops.OpOverload) or not isinstance(value, torch.Tensor):
        return False
    static = all(isinstance(s, int) for s in value.shape)
    return static and value.numel() <= _MOST_ELEMENTS
