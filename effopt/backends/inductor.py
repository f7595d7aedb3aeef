"""Hands a lowered graph to Inductor, or to eager.

Only public seams: `torch._inductor.compile` and its options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import isfunction
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.utils.checkpoint
from torch._dynamo.source import ConstantSource
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from effopt.backends.aliasing import SettleAliases
from effopt.backends.outline import OUTLINED
from effopt.backends.vector_probe import SETTING, takes_vectors
from effopt.graph.opaque import writer_in

_invoke = torch.ops.higher_order.invoke_subgraph
_checkpoint = torch.ops.higher_order.tag_activation_checkpoint

# Inductor's slots for passes of others.
_BEFORE_LOWERING, _AFTER_FUSION = "post_grad_custom_pre_pass", "_post_fusion_custom_pass"


def compile_graph(
    module: GraphModule, inputs: Sequence[Any], options: Mapping[str, Any], identity: str
) -> Callable[..., Any]:
    """Compile `module` with Inductor.

    Args:
        module: plain ATen and lowering calls.
        inputs: the real inputs of the compile call.
        options: Inductor configuration entries.
        identity: source, options and versions of all that made the graph; part of Inductor's cache
            key, so that its caches stay on and never serve another version's code.
    """
    import torch._inductor as inductor
    from torch._inductor import config

    marked = {**config.unsafe_marked_cacheable_functions, "effopt": identity}
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__module__", "").startswith("effopt"):
            marked[f"{node.target.__module__}.{node.target.__name__}"] = identity
    _name_constants(module)
    # The user's own come from the options, else from Inductor's configuration at this moment.
    theirs = options.get(_BEFORE_LOWERING, getattr(config, _BEFORE_LOWERING))
    patches = {
        **options,
        **_vectors(options),
        "unsafe_marked_cacheable_functions": marked,
        _BEFORE_LOWERING: _first(SettleAliases(), theirs),
        **_shared_files(options.get(_AFTER_FUSION) or getattr(config, _AFTER_FUSION, None)),
        **_settings_of_kernels(module),
    }
    with _own_buffers(module), _known_to_write_nothing(module):
        compiled: Callable[..., Any] = inductor.compile(module, list(inputs), options=patches)
    return compiled


def why_no_subgraphs(options: Mapping[str, Any]) -> str:
    """Why Inductor with these options cannot call an outlined block; empty if it can."""
    from torch._inductor import config

    if options.get("cpp_wrapper", config.cpp_wrapper):
        return "Inductor writes no calls of subgraphs with `cpp_wrapper`"
    return ""


def _vectors(options: Mapping[str, Any]) -> dict[str, Any]:
    """The setting that spares the test programs of vector instructions, unless the user has set it."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    if SETTING in options or "cpp.cxx" in options or config.cpp.vec_isa_ok is not None:
        return {}
    try:
        compiler = get_cpp_compiler()
    except RuntimeError:
        return {}  # Inductor says that there is none, if it needs one
    return {SETTING: True} if takes_vectors(compiler) else {}


def _shared_files(theirs: Any) -> dict[str, Any]:
    """The setting that has kernels share files: not beside a pass of the user's, nor on torch 2.11.

    There a pass in this slot has no identity, and Inductor would stop caching.
    """
    if theirs is not None or not hasattr(custom_graph_pass, "CustomSchedulerPass"):
        return {}
    from effopt.backends.kernel_files import ShareFiles  # imports all of Inductor

    return {_AFTER_FUSION: ShareFiles()}


def _settings_of_kernels(module: GraphModule) -> dict[str, Any]:
    """What the kernels of a graph, those in outlined blocks too, ask for by `inductor_settings`."""
    graphs = (m.graph for m in module.modules() if isinstance(m, GraphModule))
    called = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    settings = (getattr(target, "inductor_settings", {}) for target in called if isfunction(target))
    return {name: value for each in settings for name, value in each.items()}


LOST_WRITES = (
    "run without Inductor: what is written to a float64 of no dimension on a CPU is lost by AOTAutograd; give"
    " the buffer one dimension, or another dtype"
)


def loses_writes(given: Any) -> bool:
    """Whether AOTAutograd loses what a graph writes to this input.

    Dynamo takes a float64 of no dimension for a Python number and traces anew without the write (torch 2.13;
    `buffer.add_(1)` does nothing under `aot_eager`).
    """
    plain = isinstance(given, torch.Tensor) and given.dim() == 0 and given.device.type == "cpu"
    return plain and given.dtype == torch.float64


def run_eagerly(module: GraphModule) -> Callable[..., Any]:
    """`module` without Inductor, its checkpointed regions with the random state that they ran with.

    In a graph, the compiler sees to that state, and the operator itself recomputes dropout with another.
    """
    for part in (m for m in module.modules() if isinstance(m, GraphModule)):
        for node in part.graph.find_nodes(op="call_function", target=_checkpoint):
            node.target, node.kwargs = _checkpoint_eagerly, {}
        part.recompile()
    return module.forward


def _checkpoint_eagerly(region: GraphModule, *inputs: Any) -> Any:
    """A region that writes its buffers reads them as eager's modules do: they are no operands to be saved."""
    run = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=True)
    return run(region, *inputs) if writer_in(region) is None else run(partial(region, *inputs))


def _own_buffers(module: GraphModule) -> AbstractContextManager[Any]:
    """Keep a subgraph's backward from writing into its operands.

    Which saved tensors a backward graph may overwrite is known by their positions in the whole graph;
    Inductor 2.13 takes the same positions for the operands of a subgraph, and overwrites tangents that
    the caller reads again. The list is made while the forward graph is compiled.
    """
    has_subgraphs = bool(module.graph.find_nodes(op="call_function", target=_invoke))
    return functorch_config.patch(donated_buffer=False) if has_subgraphs else nullcontext()


@contextmanager
def _known_to_write_nothing(module: GraphModule) -> Iterator[None]:
    """Say of outlined blocks that they write none of their operands, which is so by construction.

    In training, torch 2.13 finds that out by tracing the block again at every call: 1.2 s of 13 s of
    processor time for Llama with 12 layers. Graphs with subgraphs of another origin are left to it. The flag
    is of the process, and compilations come one at a time (effopt/compile.py).
    """
    calls = module.graph.find_nodes(op="call_function", target=_invoke)
    ours = all(str(call.args[1]).startswith(OUTLINED) for call in calls)
    if not calls or not ours or not hasattr(_invoke, "_supports_training_input_mutation"):
        yield
        return
    before = _invoke._supports_training_input_mutation
    _invoke._supports_training_input_mutation = True
    try:
        yield
    finally:
        _invoke._supports_training_input_mutation = before


def _name_constants(module: GraphModule) -> None:
    """Give the inputs and tensors that we added the guard source that AOTAutograd asks of each."""
    for node in module.graph.find_nodes(op="placeholder"):
        if not hasattr(node, "_dynamo_source"):
            node._dynamo_source = ConstantSource(f"effopt_{node.name}")
    sources = getattr(module, "_param_name_to_source", None)
    if sources is None:
        return
    stored = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    missing = {name: ConstantSource(f"effopt_{name}") for name in stored if name not in sources}
    module._param_name_to_source = {**sources, **missing}  # type: ignore[assignment]


class _InTurn(CustomGraphPass):
    """Passes one after the other, as one: torch 2.11 takes a single one in a slot."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        """Of all of them; None, which keeps Inductor from caching, if one has none."""
        known = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return None if None in known else tuple(known)


def _first(ours: CustomGraphPass, theirs: Any) -> Any:
    """Our pass, and then the one that the user set for the same slot."""
    if theirs is None:
        return ours
    passes = [ours, *(theirs if isinstance(theirs, (list, tuple)) else [theirs])]
    return passes if hasattr(custom_graph_pass, "get_custom_graph_passes") else _InTurn(passes)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor options of a `torch.compile` mode."""
    if not mode or mode == "default":
        return {}
    return dict(torch._inductor.list_mode_options(mode))
