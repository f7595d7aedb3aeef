"""A Dynamo graph to normal form, and back.

Normal form: functional, pre-dispatch ATen. Composite ops stay whole, nothing is written in place,
the new values of mutated inputs are the first outputs, every node has a fake value. There is no
gradient mode and no autocast state in the graph: `no_grad` regions read detached operands, and the
casts that autocast would make are nodes.

`aot_export_module` is not public API; this is the only module that calls it (design decision 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_export_module
from torch.fx import GraphModule, Node

from effopt.errors import CaptureRefused
from effopt.graph import normalize
from effopt.graph.values import val

_aten = torch.ops.aten


@dataclass
class Captured:
    """A graph in normal form and what is needed to run it in place of the original."""

    module: GraphModule
    """Inputs as the original; outputs are the values of `mutated`, then the original's outputs."""
    mutated: tuple[int, ...]
    """Positions of the inputs whose new values are the first outputs, in output order."""
    training: bool
    """Whether a backward pass can be taken through it."""


def is_training(inputs: Sequence[Any]) -> bool:
    """Whether autograd is on and some input asks for a gradient."""
    return torch.is_grad_enabled() and any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs)


def capture(module: GraphModule, inputs: Sequence[Any]) -> Captured:
    """Bring the graph that Dynamo captured to normal form.

    Args:
        module: Dynamo's graph, parameters lifted to inputs.
        inputs: the real inputs of the call being compiled: tensors, numbers, symbolic sizes.

    Raises:
        CaptureRefused: with the reason, if the graph cannot be represented; it then runs unchanged.
    """
    _refuse_inputs(inputs)
    training = is_training(inputs)
    try:
        exported, signature = aot_export_module(module, list(inputs), trace_joint=False, pre_dispatch=True)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise CaptureRefused(f"functional capture failed: {type(error).__name__}: {first_line}") from error
    if not isinstance(exported, GraphModule):
        raise CaptureRefused("functional capture gave no graph")
    names = [node.name for node in exported.graph.find_nodes(op="placeholder")]
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    mutated = tuple(names.index(name) for name in written)
    if torch.is_grad_enabled():
        for position in mutated:
            if isinstance(inputs[position], torch.Tensor) and inputs[position].requires_grad:
                raise CaptureRefused(f"input {names[position]} requires a gradient and is written in place")
    _refuse_shared_storage(inputs, mutated)
    _keep_identity(module, exported)
    normalize.remove_grad_mode(exported, training)
    normalize.make_casts_explicit(exported)
    normalize.drop_bookkeeping(exported, training)
    return Captured(exported, mutated, training)


def _refuse_inputs(inputs: Sequence[Any]) -> None:
    for position, value in enumerate(inputs):
        if not isinstance(value, torch.Tensor):
            continue
        plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or isinstance(
            value, torch._subclasses.FakeTensor
        )
        if not plain:
            raise CaptureRefused(f"input {position} is a tensor subclass, {type(value).__name__}")
        if value.layout != torch.strided:
            raise CaptureRefused(f"input {position} has layout {value.layout}; only strided tensors are rewritten")
        if value.is_quantized:
            raise CaptureRefused(f"input {position} is a quantized tensor")


def _refuse_shared_storage(inputs: Sequence[Any], mutated: Sequence[int]) -> None:
    """A write through one of several inputs with one storage is seen by the others: not functional."""
    owners: dict[int, list[int]] = {}
    for position, value in enumerate(inputs):
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel():
            try:
                owners.setdefault(value.untyped_storage()._cdata, []).append(position)
            except (RuntimeError, NotImplementedError):
                continue
    for position in mutated:
        for sharing in owners.values():
            if position in sharing and len(sharing) > 1:
                raise CaptureRefused(f"input {position} is written in place and shares storage with another input")


def _keep_identity(original: GraphModule, exported: GraphModule) -> None:
    """Keep what AOTAutograd reads of a Dynamo graph: guard sources and static inputs."""
    exported.meta.update(original.meta)
    for name in ("_param_name_to_source",):
        if hasattr(original, name):
            setattr(exported, name, getattr(original, name))
    pairs = zip(
        original.graph.find_nodes(op="placeholder"), exported.graph.find_nodes(op="placeholder"), strict=True
    )
    for old, new in pairs:
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
        for key in ("tensor_dict", "example_value", "steal_arg", "grapharg"):
            if key in old.meta:
                new.meta[key] = old.meta[key]


def restore(captured: Captured) -> GraphModule:
    """Undo the functional form: write mutated inputs back and return what the original returned.

    Outputs that were views of a mutated input are views of it again, and every output has the
    strides that the original gave it.
    """
    module = captured.module
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    values = list(output.args[0])
    count = len(captured.mutated)
    fresh, returned = values[:count], values[count:]
    placeholders = list(graph.find_nodes(op="placeholder"))
    rebased: dict[Node, Node] = {}
    with graph.inserting_before(output):
        for position, new in zip(captured.mutated, fresh, strict=True):
            if new is placeholders[position]:
                continue
            written = graph.call_function(_aten.copy_.default, (placeholders[position], new))
            written.meta["val"] = val(placeholders[position])
            if isinstance(new, Node):
                rebased[new] = placeholders[position]
        returned = [_rebase(graph, node, rebased) for node in returned]
    output.args = (tuple(returned),)
    _tolerate_strides(module)
    module.graph.lint()
    module.recompile()
    return module


def _rebase(graph: torch.fx.Graph, node: Any, rebased: dict[Node, Node]) -> Any:
    """The same value as `node`, read through the written input if `node` is a view of its new value."""
    if not isinstance(node, Node):
        return node
    if node in rebased:
        return rebased[node]
    chain = []
    base = node
    while isinstance(base, Node) and base not in rebased and normalize.is_view(base):
        chain.append(base)
        base = base.args[0]  # type: ignore[assignment]
    if base not in rebased:
        return node
    source = rebased[base]
    for view in reversed(chain):
        again = graph.call_function(view.target, (source, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
        again.meta.update(view.meta)
        source = again
    return source


def _tolerate_strides(module: GraphModule) -> None:
    """A kernel may give other strides than the op it replaced: `view` becomes `reshape` there.

    Views that end at an input keep aliasing it, since those strides are the caller's.
    """
    for node in module.graph.find_nodes(op="call_function", target=_aten.view.default):
        base = node.args[0]
        while isinstance(base, Node) and normalize.is_view(base):
            base = base.args[0]  # type: ignore[assignment]
        if isinstance(base, Node) and base.op != "placeholder":
            node.target = _aten.reshape.default
