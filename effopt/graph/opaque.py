"""Higher-order operators set aside while a graph is captured, and put back afterwards.

`cond`, `map`, `flex_attention`, checkpointed regions, custom autograd functions and nested compiled
regions carry a meaning that their bodies alone do not: a backward of their own, a memory contract, a
branch. Tracing through them would lose it. During capture one opaque op stands for each; afterwards the
original call, bodies untouched, takes its place again.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from effopt.errors import CaptureRefused
from effopt.graph.values import val

_library = torch.library.Library("effopt_capture", "DEF")
_library.define("set_aside(Tensor[] tensors, SymInt[] sizes, int key) -> Tensor[]")
_SET_ASIDE = torch.ops.effopt_capture.set_aside.default
_keys = itertools.count()
_results: dict[int, list[Tensor]] = {}
"""Key of a call that is set aside -> fake results, for as long as its graph is being captured."""

_STATISTICS = {torch.nn.functional.batch_norm: 5, torch.nn.functional.instance_norm: 5}
"""Functions that write running statistics when asked to use those of the batch; position of that argument."""

_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}")
    for name in "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor".split()
} | {operator.setitem, operator.delitem}


@torch.library.register_fake("effopt_capture::set_aside", lib=_library)
def _(tensors: Sequence[Tensor], sizes: Sequence[Any], key: int) -> list[Tensor]:
    return [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device) for t in _results[key]]


@dataclass
class Call:
    """One call of a higher-order operator."""

    target: Any
    leaves: list[Any]
    """Flat operands; a `_Slot` where a tensor or a size of the graph goes."""
    spec: pytree.TreeSpec
    bodies: dict[str, GraphModule]
    meta: dict[str, Any]
    is_tuple: bool
    """Whether it returns a tuple, or one tensor."""


@dataclass(frozen=True)
class _Slot:
    kind: str  # tensor | size | body
    index: Any


def is_higher_order(node: Node) -> bool:
    """Whether a node calls a higher-order operator."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


@contextmanager
def set_aside(module: GraphModule) -> Iterator[dict[int, Call]]:
    """Replace every higher-order call of `module`, in place, by the opaque op, while the context lasts.

    Raises:
        CaptureRefused: a call that writes its operands, or returns something other than tensors.
    """
    calls: dict[int, Call] = {}
    try:
        for node in [n for n in module.graph.nodes if is_higher_order(n)]:
            _refuse_writes(module, node)
            key = next(_keys)
            _results[key] = _fake_results(node)
            calls[key] = _stand_in(module, node, key)
        if calls:
            # Not `eliminate_dead_code`: it takes a method that writes in place for one without effect.
            for read in [n for n in module.graph.find_nodes(op="get_attr") if not n.users]:
                module.graph.erase_node(read)
            module.recompile()
        yield calls
    finally:
        for key in calls:
            _results.pop(key, None)


def put_back(module: GraphModule, calls: dict[int, Call]) -> None:
    """Replace each opaque op of the captured graph by the call that it stands for."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_SET_ASIDE):
        tensors, sizes, key = node.args
        call = calls[key]
        with graph.inserting_before(node):
            leaves = [_filled(module, call, leaf, tensors, sizes) for leaf in call.leaves]
            args, kwargs = pytree.tree_unflatten(leaves, call.spec)
            made = graph.call_function(call.target, args, kwargs)
        made.meta.update(call.meta)
        made.meta.update({k: v for k, v in node.meta.items() if k in ("custom", "no_grad")})
        made.meta["val"] = tuple(val(node)) if call.is_tuple else val(node)[0]
        _move_uses(node, made, call.is_tuple)
        graph.erase_node(node)
    module.recompile()


def _filled(module: GraphModule, call: Call, leaf: Any, tensors: Any, sizes: Any) -> Any:
    if not isinstance(leaf, _Slot):
        return leaf
    if leaf.kind == "body":
        name = leaf.index
        while hasattr(module, name) and getattr(module, name) is not call.bodies[leaf.index]:
            name = f"_{name}"
        module.add_module(name, call.bodies[leaf.index])
        return module.graph.get_attr(name)
    return (tensors if leaf.kind == "tensor" else sizes)[leaf.index]


def _move_uses(old: Node, new: Node, is_tuple: bool) -> None:
    for user in list(old.users):
        if user.target is not operator.getitem:
            raise CaptureRefused(f"the results of {new.target} are used as a list")
        if is_tuple:
            user.replace_input_with(old, new)
        else:
            user.replace_all_uses_with(new)
            user.graph.erase_node(user)


def _fake_results(node: Node) -> list[Tensor]:
    example = node.meta.get("example_value")
    results = [example] if isinstance(example, Tensor) else example
    if (
        not isinstance(results, (tuple, list))
        or not all(isinstance(r, Tensor) for r in results)
        or not results
    ):
        raise CaptureRefused(f"{node.target} returns something other than tensors")
    return list(results)


def _stand_in(module: GraphModule, node: Node, key: int) -> Call:
    flat, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, Node))
    tensors: list[Node] = []
    sizes: list[Node] = []
    bodies: dict[str, GraphModule] = {}
    leaves: list[Any] = []
    for leaf in flat:
        leaves.append(leaf)
        if not isinstance(leaf, Node):
            continue
        value = leaf.meta.get("example_value")
        attribute = _attribute(module, leaf)
        if isinstance(attribute, GraphModule):
            bodies[str(leaf.target)] = attribute
            leaves[-1] = _Slot("body", str(leaf.target))
        elif isinstance(value, Tensor) or isinstance(attribute, Tensor):
            leaves[-1] = _Slot("tensor", len(tensors))
            tensors.append(leaf)
        elif isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            leaves[-1] = _Slot("size", len(sizes))
            sizes.append(leaf)
        else:
            raise CaptureRefused(f"{node.target} takes {leaf.name}, which is neither tensor nor size")
    is_tuple = not isinstance(node.meta["example_value"], Tensor)
    with module.graph.inserting_before(node):
        made = module.graph.call_function(_SET_ASIDE, (tensors, sizes, key))
        made.meta.update({k: v for k, v in node.meta.items() if k != "example_value"})
        if not is_tuple:
            first = module.graph.call_function(operator.getitem, (made, 0))
            first.meta.update(node.meta)
    node.replace_all_uses_with(made if is_tuple else first)
    module.graph.erase_node(node)
    meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
    return Call(node.target, leaves, spec, bodies, meta, is_tuple)


def _attribute(module: GraphModule, node: Node) -> Any:
    if node.op != "get_attr":
        return None
    return operator.attrgetter(str(node.target))(module)


def _refuse_writes(module: GraphModule, node: Node) -> None:
    if "mutation" in str(node.target):
        raise CaptureRefused(f"{node.target} writes its operands")
    for operand in node.all_input_nodes:
        body = _attribute(module, operand)
        if isinstance(body, GraphModule):
            call = writer_in(body)
            if call is not None:
                raise CaptureRefused(f"{node.target} has a body that writes in place ({call.name})")


def writer_in(body: GraphModule) -> Node | None:
    """A call that writes in place, in a body of Dynamo's vocabulary or in one of its own bodies."""
    graphs = (m.graph for m in body.modules() if isinstance(m, GraphModule))
    return next((call for graph in graphs for call in graph.nodes if _writes(call)), None)


def _writes(node: Node) -> bool:
    """Whether a call of Dynamo's vocabulary (functions and methods of torch) changes an operand."""
    target = node.target
    if node.op == "call_method":
        return str(target).endswith("_") and not str(target).endswith("__")
    if node.op != "call_function":
        return False
    if target in _STATISTICS:
        position = _STATISTICS[target]
        return bool(node.args[position] if len(node.args) > position else node.kwargs.get("training", True))
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if target in _IN_PLACE_OPERATORS:
        return True
    name = getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")
