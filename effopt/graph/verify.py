"""What a valid graph is.

Between passes: placeholders first, one output last, definitions before uses, every call functional with a
known target and a fake value that its operands give. After lowering: targets may be kernels' host
functions, and inputs are written back by `copy_`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from effopt.errors import InvalidGraphError
from effopt.graph.region import stored
from effopt.graph.values import fake_call, val

_LEFT_BY_LOWERING = frozenset({torch.ops.aten.copy_.default})


def check_graph(module: GraphModule, *, lowered: bool = False, values: bool = False) -> None:
    """Raise InvalidGraphError that names the first node that is not valid, and why.

    Args:
        module: the graph to look at; not changed.
        lowered: whether backends have put their calls in place.
        values: also evaluate every call on fake operands and compare with its recorded value.
    """
    seen: set[Node] = set()
    nodes = list(module.graph.nodes)
    outputs = [n for n in nodes if n.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        raise InvalidGraphError(f"a graph ends in its one output; this one has {len(outputs)}")
    computing = False
    for node in nodes:
        computing = computing or node.op == "call_function"
        for fault in _faults(module, node, seen, computing, lowered):
            raise InvalidGraphError(f"{node.name} ({node.target}): {fault}")
        if values and node.op == "call_function":
            _check_value(node)
        seen.add(node)


def _faults(
    module: GraphModule, node: Node, seen: set[Node], computing: bool, lowered: bool
) -> Iterator[str]:
    if node.op not in ("placeholder", "call_function", "get_attr", "output"):
        yield f"{node.op} nodes are not in normal form"
    if node.op == "placeholder" and computing:
        yield "placeholders come first"
    for operand in node.all_input_nodes:
        if operand.graph is not module.graph:
            yield f"reads {operand.name}, which is in another graph"
        elif operand not in seen:
            yield f"reads {operand.name}, which is defined later or was erased"
        elif node not in operand.users:
            yield f"is not among the users of {operand.name}"
    if node.op == "get_attr" and stored(node) is None:
        yield "reads an attribute that the module does not have"
    if node.op == "call_function":
        yield from _call_faults(node, lowered)


def _call_faults(node: Node, lowered: bool) -> Iterator[str]:
    target = node.target
    for size in pytree.arg_tree_leaves(*node.args, **node.kwargs):
        if isinstance(size, torch.SymInt):
            yield f"holds the symbol {size}; a symbolic size is a node"
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable and not (lowered and target in _LEFT_BY_LOWERING):
            yield "writes in place; normal form is functional"
    elif not callable(target):
        yield f"calls {target!r}, which is not a function"
    elif not (lowered or _is_known(target)):
        yield "calls something that is neither an op, a higher-order op nor arithmetic on sizes"
    if "val" not in node.meta and not lowered and _has_value(target):
        yield "has no fake value (meta['val'])"


def _has_value(target: Any) -> bool:
    """Whether calls have a fake value; what checks a size that data decide (`_assert_scalar`) has none."""
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.returns)
    return not isinstance(target, torch._ops.HigherOrderOperator)


def _is_known(target: Callable[..., Any]) -> bool:
    if isinstance(target, (torch._ops.HigherOrderOperator, torch._ops.OpOverloadPacket)):
        return True
    module = getattr(target, "__module__", "") or ""
    return (
        module in ("_operator", "math", "builtins")
        or module.split(".")[0] == "torch"
        or target is operator.getitem
    )


def _check_value(node: Node) -> None:
    """Compare the recorded value with what the operands give."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    try:
        made = fake_call(node.target, node.args, node.kwargs)
    except Exception as error:
        raise InvalidGraphError(
            f"{node.name} ({node.target}) does not accept its operands: {error}"
        ) from error
    was = val(node)
    pairs = zip(was, made, strict=True) if isinstance(was, (tuple, list)) else [(was, made)]
    for recorded, computed in pairs:
        if not isinstance(recorded, torch.Tensor):
            continue
        facts = [
            (f"{list(map(str, t.shape))} {t.dtype} on {t.device}", len(t.shape)) for t in (recorded, computed)
        ]
        if facts[0] != facts[1]:
            raise InvalidGraphError(
                f"{node.name} ({node.target}) is recorded as {facts[0][0]}, but gives {facts[1][0]}"
            )
