"""Where a node came from: layer path and source line."""

from __future__ import annotations

import re

from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_PREFIX = re.compile(r"L\['(?:self|[^']+)'\]\.?|\[(?P<index>\d+)\]|\['(?P<key>[^']+)'\]")


def layer_of(node: Node) -> str:
    """Module path of the innermost module, as `named_modules` spells it; empty at top level."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return clean_path(path)


def clean_path(path: str) -> str:
    """`L['self'].model.layers[3].mlp` or `L['self']._modules['a']` -> `model.layers.3.mlp`."""
    path = path.replace("._modules", "").replace("._parameters", "").replace("._buffers", "")

    def plain(found: re.Match[str]) -> str:
        inner = found.group("index") or found.group("key")
        return f".{inner}" if inner is not None else ""

    return _PREFIX.sub(plain, path).strip(".")


def source_of(node: Node) -> str:
    """`file:line in function` of the line in the model that made the node; empty if unknown."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return ""
    last = frames[-1]
    return f"{last['file']}:{last['line']} in {last['function']}"
