"""Normal form back to a graph with the original's effects: writes, aliases and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from effopt.errors import InvalidGraphError
from effopt.graph import in_place, normalize
from effopt.graph.capture import Captured, OutputForm, output_forms
from effopt.graph.values import val

_aten = torch.ops.aten
_ORDERED = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
"""Dtypes that `maximum` takes."""


def restore(captured: Captured, runs_eagerly: bool = False) -> GraphModule:
    """Undo the functional form: write mutated inputs back and return what the original returned.

    Outputs that were views of an input, or of a written input's new value, are so again; those that had
    memory of their own have it; and every output has the strides that the original gave it.

    Args:
        captured: its module is edited and returned.
        runs_eagerly: do what Inductor does itself: make a new value in place where nothing reads the
            old one later.

    Raises:
        InvalidGraphError: a pass left an output that no longer reads the input that it was a view of.
    """
    module = captured.module
    graph = module.graph
    count = len(captured.mutated)
    _keep_apart(captured)
    (output,) = graph.find_nodes(op="output")
    values = list(output.args[0])
    _keep_order(graph, values[count:], captured.outputs)
    values = list(output.args[0])
    _clone_old_reads(graph, output, captured, values)
    if captured.training:
        _keep_old_values(graph, captured.mutated)
    elif runs_eagerly:
        in_place.write_in_place(graph, captured.mutated)
    values = list(output.args[0])
    output.args = (tuple(_write_back(graph, output, captured, values)),)
    _tolerate_strides(module)
    module.graph.lint()
    module.recompile()
    return module


def _keep_apart(captured: Captured) -> None:
    """Clone outputs that had memory of their own and, after the passes, share it."""
    graph = captured.module.graph
    (output,) = graph.find_nodes(op="output")
    now = output_forms(captured.module, captured.mutated)
    values = list(output.args[0])
    count = len(captured.mutated)
    for index, (was, is_) in enumerate(zip(captured.outputs, now, strict=True)):
        if was.kind in ("input", "written") and (was.kind, was.owner) != (is_.kind, is_.owner):
            raise InvalidGraphError(
                f"output {index} was a view of input {was.owner}, and after the passes is not "
                f"({values[count + index]})"
            )
        if was.kind == "fresh" and (is_.kind, is_.owner) != ("fresh", was.owner):
            values[count + index] = _clone(graph, output, values[count + index])
    output.args = (tuple(values),)


def _clone(graph: Graph, before: Node, node: Node) -> Node:
    with graph.inserting_before(before):
        made = graph.call_function(_aten.clone.default, (node,))
    made.meta.update(node.meta)
    return made


def _keep_order(graph: Graph, returned: Sequence[Any], forms: Sequence[OutputForm]) -> None:
    """Make a lowered or rewritten node that an output reads lie in memory as the original did.

    Costs nothing where it does already: `contiguous` of a contiguous tensor is that tensor.
    """
    done = set()
    for node, form in zip(returned, forms, strict=True):
        if form.kind != "fresh" or form.order is None:
            continue
        root = normalize.view_root(node)
        is_touched = "effopt" in root.meta or not isinstance(root.target, torch._ops.OpOverload)
        if root in done or not is_touched or val(root).dim() != len(form.order):
            continue
        done.add(root)
        order, inverse = list(form.order), [form.order.index(d) for d in range(len(form.order))]
        users = list(root.users)
        with graph.inserting_after(root):
            outermost_first = graph.call_function(_aten.permute.default, (root, order))
        with graph.inserting_after(outermost_first):
            packed = graph.call_function(_aten.contiguous.default, (outermost_first,))
        with graph.inserting_after(packed):
            again = graph.call_function(_aten.permute.default, (packed, inverse))
        for made in (outermost_first, packed, again):
            made.meta.update({k: v for k, v in root.meta.items() if k != "val"})
        again.meta["val"] = val(root)
        packed.meta["val"] = outermost_first.meta["val"] = val(root).permute(order)
        for user in users:
            user.replace_input_with(root, again)


def _clone_old_reads(graph: Graph, output: Node, captured: Captured, values: list[Any]) -> None:
    """Values that read the old memory of a written input are copied before anything is written."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    written = {placeholders[p] for p in captured.mutated}
    for index, node in enumerate(values):
        if not isinstance(node, Node) or not isinstance(val(node), torch.Tensor):
            continue
        is_new_value = index < len(captured.mutated)
        if is_new_value and node is placeholders[captured.mutated[index]]:
            continue
        form = None if is_new_value else captured.outputs[index - len(captured.mutated)]
        if normalize.view_root(node) in written and (form is None or form.kind != "written"):
            values[index] = _clone(graph, output, node)
    output.args = (tuple(values),)


def _keep_old_values(graph: Graph, mutated: Sequence[int]) -> None:
    """Read written inputs through a copy, which is saved for the backward pass and never made again there.

    Autograd refuses a saved tensor that was overwritten. AOTAutograd computes again from one, unless told
    not to: torch 2.13 gives `y * buffer.add_(1)` the gradient of `buffer + 2`, without effopt too.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    (output,) = graph.find_nodes(op="output")
    for position in mutated:
        old = placeholders[position]
        users = [user for user in old.users if user is not output]
        if not users:
            continue
        with graph.inserting_after(placeholders[-1]):
            copied = _copy(graph, old)
        copied.meta |= {"val": val(old), "recompute": CheckpointPolicy.MUST_SAVE}
        for user in users:
            user.replace_input_with(old, copied)


def _copy(graph: Graph, node: Node) -> Node:
    """A copy that Inductor makes: it takes `clone` for its operand wherever no result shows it.

    What requires a gradient is not written within the graph of AOTAutograd, and `clone` is enough.
    """
    value = val(node)
    if value.requires_grad or value.dtype not in _ORDERED:
        return graph.call_function(_aten.clone.default, (node,))
    return graph.call_function(_aten.maximum.default, (node, node))


def _write_back(graph: Graph, output: Node, captured: Captured, values: Sequence[Any]) -> list[Any]:
    count = len(captured.mutated)
    placeholders = list(graph.find_nodes(op="placeholder"))
    rebased: dict[Node, Node] = {}
    with graph.inserting_before(output):
        for position, new in zip(captured.mutated, values[:count], strict=True):
            if new is placeholders[position]:
                continue
            written = graph.call_function(_aten.copy_.default, (placeholders[position], new))
            written.meta["val"] = val(placeholders[position])
            if isinstance(new, Node):
                rebased[new] = placeholders[position]
        return [
            _rebase(graph, node, rebased) if form.kind == "written" else node
            for node, form in zip(values[count:], captured.outputs, strict=True)
        ]


def _rebase(graph: Graph, node: Any, rebased: dict[Node, Node]) -> Any:
    """The same value as `node`, read through the written input if `node` is a view of its new value."""
    chain = []
    base = node
    while base not in rebased:
        below = normalize.view_base(base)
        if below is None:
            return node
        chain.append(base)
        if base.target is not normalize.GETITEM:
            base = below
        else:
            base = base.args[0]
            chain.append(base)
            base = below
    source = rebased[base]
    for view in reversed(chain):
        again = graph.call_function(view.target, (source, *view.args[1:]), view.kwargs)
        again.meta.update(view.meta)
        source = again
    return source


def _tolerate_strides(module: GraphModule) -> None:
    """A kernel may give other strides than the op it replaced: `view` becomes `reshape` there.

    Views that end at an input keep aliasing it, since those strides are the caller's.
    """
    for node in module.graph.find_nodes(op="call_function", target=_aten.view.default):
        root = normalize.view_root(node)
        if root.op != "placeholder":
            node.target = _aten.reshape.default
