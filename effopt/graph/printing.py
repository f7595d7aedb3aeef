"""A graph as text: lines for a person to read, and a listing that leaves nothing out.

%mul_4: f32[1, 16, 64] = mul(%x, %rsqrt)
mul_4 = aten.mul.Tensor(x, rsqrt) : float32[1, 16, 64]  # layers.0.norm
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from effopt.graph.provenance import layer_of, source_of
from effopt.graph.values import val

_DTYPES = {"float": "f", "bfloat": "bf", "complex": "c", "int": "i", "uint": "u"}
_HIDDEN_ARGUMENTS = frozenset({"device", "layout", "pin_memory", "memory_format"})
_TO_THE_END = 2**63 - 1  # what ATen's slice has for an end that was not given


@dataclass(frozen=True)
class Line:
    """One node of a listing."""

    name: str
    op: str
    """`attention`, `mul`; the namespace is told by `is_canonical`."""
    is_canonical: bool
    text: str
    layer: str
    source: str


def type_of(value: Any) -> str:
    """`f32[2, 16, 64]` of a tensor, `i64` of a size, `(f32[2], f32[2])` of several results."""
    if isinstance(value, torch.Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_of(v) for v in value)})"
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return "i64"
    return type(value).__name__


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    for long, short in _DTYPES.items():
        if name.startswith(long) and name[len(long) :].isdigit():
            return short + name[len(long) :]
    return name


def op_of(node: Node) -> str:
    """The plain name of what a node calls; `input` of a placeholder."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)
    name = getattr(node.target, "__name__", str(node.target))
    return "item" if node.target is operator.getitem else str(name)


def line_of(node: Node) -> Line:
    """How one node is shown."""
    canonical = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in (
        "aten",
        "prim",
        "prims",
    )
    shown = [_argument(a) for a in node.args]
    shown += [f"{k}={_argument(v)}" for k, v in node.kwargs.items() if k not in _HIDDEN_ARGUMENTS]
    text = f"%{node.name}: {type_of(val(node))} = {op_of(node)}({', '.join(shown)})"
    return Line(node.name, op_of(node), canonical, text, layer_of(node), source_of(node))


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(v) for v in value)}]"
    if isinstance(value, torch.dtype):
        return _dtype(value)
    if isinstance(value, int) and value == _TO_THE_END:
        return "end"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def lines(nodes: Iterable[Node]) -> tuple[Line, ...]:
    """The calls among `nodes`, in order."""
    return tuple(line_of(n) for n in nodes if n.op == "call_function")


def listing(module: GraphModule | Graph) -> str:
    """A whole graph, nothing left out, one line a node: name, target, arguments, value, layer.

    Stable, so that two can be compared.
    """
    graph = module.graph if isinstance(module, GraphModule) else module
    return "".join(f"{_exact(node)}\n" for node in graph.nodes)


def _exact(node: Node) -> str:
    arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    values = val(node) if isinstance(val(node), (tuple, list)) else (val(node),)
    shown = ", ".join(
        f"{str(v.dtype).removeprefix('torch.')}[{', '.join(map(str, v.shape))}]"
        if hasattr(v, "dtype")
        else str(v)
        for v in values
    )
    where = layer_of(node)
    return f"{node.name} = {node.target}({arguments}) : {shown}" + (f"  # {where}" if where else "")


def repeated_layer(graph: Graph) -> str:
    """Path of the second copy of the module that is repeated and holds most nodes: `model.layers.1`.

    The second, because the first also holds what all layers share. Empty if nothing is repeated.
    """
    sizes: Counter[str] = Counter()
    for node in graph.nodes:
        parts = layer_of(node).split(".")
        for end, part in enumerate(parts, start=1):
            if part.isdigit():
                sizes[".".join(parts[:end])] += 1
    best: tuple[int, str] = (0, "")
    for path, size in sizes.items():
        container, _, index = path.rpartition(".")
        sibling = f"{container}.{int(index) + 1}".lstrip(".")
        if sibling in sizes and size > best[0]:
            best = (size, sibling)
    return best[1]


def nodes_under(graph: Graph, layer: str) -> list[Node]:
    """Nodes whose layer is `layer` or inside it, in order; all nodes for the empty path."""
    return [
        n for n in graph.nodes if not layer or layer_of(n) == layer or layer_of(n).startswith(layer + ".")
    ]
