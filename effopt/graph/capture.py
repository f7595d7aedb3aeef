"""A Dynamo graph to normal form. (And back: `graph/restore.py`.)

Normal form: functional, pre-dispatch ATen. Composite ops stay whole, nothing is written in place,
the new values of mutated inputs are the first outputs, every node has a fake value. There is no
gradient mode and no autocast state in the graph: `no_grad` regions read detached operands, and the
casts that autocast would make are nodes.

`aot_export_module` is not public API; this is the only module that calls it (design decision 1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._functorch.aot_autograd import aot_export_module
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_or

from effopt.errors import CaptureRefused
from effopt.graph import autocast, normalize, opaque
from effopt.graph.capture_blocks import export_in_blocks
from effopt.graph.values import MUTATED, val

_DROPOUTS = (torch.nn.functional.dropout, torch.dropout)
_SHARED = "an input is written in place and shares storage with another input"


@dataclass
class Captured:
    """A graph in normal form and what is needed to run it in place of the original."""

    module: GraphModule
    """Inputs as the original; outputs are the values of `mutated`, then the original's outputs."""
    mutated: tuple[int, ...]
    """Positions of the inputs whose new values are the first outputs, in output order."""
    training: bool
    """Whether a backward pass can be taken through it."""
    outputs: tuple[OutputForm, ...]
    """What a caller can observe of each of the original's outputs, other than its value."""


@dataclass(frozen=True)
class OutputForm:
    """Whose memory an output reads, and in which order its dimensions lie there."""

    kind: Literal["input", "written", "fresh", "none"]
    """It reads an input; a written input's new value; memory of its own; or it is no tensor."""
    owner: int
    """Position of that input; for `fresh`, the first output that reads the same memory."""
    order: tuple[int, ...] | None = None
    """Dimensions of the memory's owner from the outermost to the innermost, if they are dense."""


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
    _refuse_held_tensors(module)
    training = is_training(inputs)
    exported, signature, calls = _export(module, inputs)
    names = [node.name for node in exported.graph.find_nodes(op="placeholder")]
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    mutated = tuple(names.index(name) for name in written)
    if torch.is_grad_enabled():
        for position in mutated:
            if isinstance(inputs[position], torch.Tensor) and inputs[position].requires_grad:
                raise CaptureRefused(f"input {names[position]} requires a gradient and is written in place")
    _refuse_shared_storage(inputs, mutated)
    keep_identity(module, exported)
    opaque.put_back(exported, calls)
    asks_for_gradient = any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs)
    normalize.remove_grad_mode(exported, training, asks_for_gradient)
    autocast.make_casts_explicit(exported, inputs)
    with torch._C._DisableAutocast():
        normalize.drop_bookkeeping(exported, training)
    exported.graph.output_node().meta[MUTATED] = mutated
    return Captured(exported, mutated, training, output_forms(exported, mutated))


def _export(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Any, dict[int, opaque.Call]]:
    """Functional pre-dispatch trace. Dynamo's graph is left as it is: a refused graph still has to run."""
    copied = GraphModule(module, copy_graph(module.graph))
    _refuse_transforms(copied)
    with opaque.set_aside(copied) as calls, _autocast_for(copied):
        try:
            in_blocks = None if calls or autocast.is_on(copied) else export_in_blocks(copied, inputs, _trace)
            exported, signature = in_blocks or _trace_with_writes(copied, list(inputs))
        except Exception as error:
            text = str(error).strip()
            if "aliased inputs that are mutated" in text:
                raise CaptureRefused(_SHARED) from error
            said = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
            raise CaptureRefused(f"functional capture failed: {said}") from error
    if not isinstance(exported, GraphModule):
        raise CaptureRefused("functional capture gave no graph")
    return exported, signature, calls


def _trace_with_writes(module: GraphModule, inputs: list[Any]) -> tuple[GraphModule, Any]:
    """As `_trace`, once more without dropouts that do nothing if one of them stands before a write."""
    try:
        return _trace(module, inputs)
    except RuntimeError as error:
        if "frozen storage" not in str(error) or not _drop_idle_dropouts(module):
            raise
        return _trace(module, inputs)


def _drop_idle_dropouts(module: GraphModule) -> bool:
    """Use the operand of dropouts that return it; whether there were any. Edits the graph.

    Dropout stays whole in a pre-dispatch trace, and functional tensors do not know then that its result
    is its operand: a write to it is refused (torch 2.13).
    """
    idle = [node for node in module.graph.nodes if node.target in _DROPOUTS and _is_idle(node)]
    for node in idle:
        node.replace_all_uses_with(node.all_input_nodes[0])
        module.graph.erase_node(node)
    module.recompile()
    return bool(idle)


def _is_idle(node: Node) -> bool:
    named = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    training, p = named.get("training", named.get("train", True)), named.get("p")
    does_nothing = training is False or (isinstance(p, (int, float)) and p == 0)
    return does_nothing and isinstance(named.get("input"), Node)


def _trace(module: GraphModule, inputs: list[Any]) -> tuple[GraphModule, Any]:
    return aot_export_module(module, inputs, trace_joint=False, pre_dispatch=True)  # type: ignore[return-value]


def _autocast_for(module: GraphModule) -> AbstractContextManager[None]:
    return autocast.traced(module) if autocast.is_on(module) else nullcontext()


def copy_graph(graph: Graph) -> Graph:
    """A copy that can be edited without touching the original; node metadata is copied one level deep."""
    copied = Graph()
    environment: dict[Node, Node] = {}
    copied.output(copied.graph_copy(graph, environment))
    return copied


def output_forms(module: GraphModule, mutated: Sequence[int]) -> tuple[OutputForm, ...]:
    """What the outputs after those of `mutated` look like to the caller."""
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    placeholders = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    values = list(output.args[0])
    written = dict(zip(values[: len(mutated)], mutated, strict=True))
    owners: dict[Node, int] = {}
    forms = []
    for index, node in enumerate(values[len(mutated) :]):
        forms.append(_form_of(node, index, placeholders, written, owners))
    return tuple(forms)


def _form_of(
    node: Any, index: int, placeholders: dict[Node, int], written: dict[Any, int], owners: dict[Node, int]
) -> OutputForm:
    if not isinstance(node, Node) or not isinstance(val(node), torch.Tensor):
        return OutputForm("none", -1)
    base: Node | None = node
    while base is not None:
        # The new value of one input can be another input, whose views are views of that one.
        if base in written and base not in placeholders:
            return OutputForm("written", written[base])
        root, base = base, normalize.view_base(base)
    if root in placeholders:
        return OutputForm("input", placeholders[root])
    return OutputForm("fresh", owners.setdefault(root, index), dense_order(val(root)))


def dense_order(value: Any) -> tuple[int, ...] | None:
    """Dimensions from the outermost to the innermost if the tensor is dense in that order, else None."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    order = sorted(range(value.dim()), key=_stride_of(value))
    expected: Any = 1
    for dim in reversed(order):
        if not statically_known_true(sym_or(value.stride(dim) == expected, value.shape[dim] == 1)):
            return None
        expected = expected * value.shape[dim]
    return tuple(order)


def _stride_of(value: torch.Tensor) -> Any:
    def compare(a: int, b: int) -> int:
        if statically_known_true(value.stride(a) > value.stride(b)):
            return -1
        if statically_known_true(value.stride(a) < value.stride(b)):
            return 1
        return a - b

    return functools.cmp_to_key(compare)


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
            raise CaptureRefused(
                f"input {position} has layout {value.layout}; only strided tensors are rewritten"
            )
        if value.is_quantized:
            raise CaptureRefused(f"input {position} is a quantized tensor")


def _refuse_held_tensors(module: GraphModule) -> None:
    """Dynamo lifts a model's tensors to inputs; an optimizer's stay in the graph, and are written there."""
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if held:
        raise CaptureRefused(
            f"the graph holds {len(held)} tensors of its own, such as {held[0]}: an optimizer's"
            " step is compiled with the model; compile the model alone to have it rewritten"
        )


def _refuse_transforms(module: GraphModule) -> None:
    """`torch.func` transforms are calls that open and close a level; the tracer cannot look below one."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__module__", None) or ""
        if node.op != "call_function" or not name.startswith(("torch._C._functorch", "torch._functorch")):
            continue
        if node.target.__name__ == "lazy_load_decompositions" and not node.users:
            module.graph.erase_node(node)  # fills a table for a transform that may have been traced away
        else:
            raise CaptureRefused(
                f"a torch.func transform ({node.target.__name__}) inside the graph; write a scan "
                "as a loop over time (models of transformers: use_associative_scan=False)"
            )


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
                raise CaptureRefused(_SHARED)


def keep_identity(original: GraphModule, exported: GraphModule) -> None:
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
            new._dynamo_source = old._dynamo_source
        for key in ("tensor_dict", "example_value", "steal_arg", "grapharg"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
