"""Where a node came from: layer path and source line."""

from __future__ import annotations

import re

from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_ROOT = re.compile(r"^[LG]\['[^']*'\]")
_CLOSURE = re.compile(r"^.*\.cell_contents")
_GETATTR = re.compile(r"getattr\((?P<base>[^(),]*), '(?P<name>[^']*)'\)")
_SUBSCRIPT = re.compile(r"\[(?P<quote>['\"]?)(?P<key>[^\]'\"]*)(?P=quote)\]")
_CALL_SUFFIX = re.compile(r"@\d+$")
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def layer_of(node: Node) -> str:
    """Module path of the innermost module, as `named_modules` spells it; empty at top level."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return clean_path(path)


def clean_path(path: str) -> str:
    """A module's source in Dynamo's spelling -> its name in `named_modules` of the outermost module.

    `L['self'].model.layers[3].mlp`, `G['model']._modules['a']`, `L['fn'].__closure__[0].cell_contents.0`
    and `getattr(L['self'], '0')` become `model.layers.3.mlp`, `a`, `0` and `0`; the second call of
    a module, which export marks as `layer@1`, is the same layer.
    """
    while (found := _GETATTR.search(path)) is not None:
        path = f"{path[: found.start()]}{found['base']}.{found['name']}{path[found.end() :]}"
    path = _ROOT.sub("", _CLOSURE.sub("", path))
    for detail in ("._modules", "._parameters", "._buffers"):
        path = path.replace(detail, "")
    path = _SUBSCRIPT.sub(r".\g<key>", path)
    return _CALL_SUFFIX.sub("", path).strip(".")


def template_of(layer: str) -> str:
    """A layer path with its numbers taken out, equal for equal layers: `model.layers.*.mlp`."""
    return _INDEX.sub("*", layer)


def source_of(node: Node) -> str:
    """`file:line in function` of the line in the model that made the node; empty if unknown."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return ""
    last = frames[-1]
    return f"{last['file']}:{last['line']} in {last['function']}"
