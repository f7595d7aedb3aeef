"""Freeing parameters that no graph reads any more, so that a quantised model takes what its codes take.

A freed parameter keeps its shape, dtype and device, which is all that a later graph of the model is traced
from, and loses its memory. Eager torch does not look before it reads such a tensor and may crash the
process, so the modules that own one, and those around them, are given checks that raise instead.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module, Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from effopt.errors import ReleasedWeightError
from effopt.graph.analyses.weight_source import parameter_path
from effopt.graph.derivation import Derivation, derivations_of, is_released
from effopt.graph.rewrite import PassResult
from effopt.graph.weights import DerivedWeights

NAME = "release-weights"
"""What records of freed parameters are filed under."""

REPLACES = "replaced weights"
"""A pass that provides this leaves parameters that its graph no longer reads."""

UNREAD = "effopt_unread"
"""Under this name of `module.meta`: placeholders of parameters that passes left without a reader."""

_readers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> the compiled graphs that read it as it is."""


@dataclass(frozen=True)
class _Freed:
    path: str
    kept: tuple[Derivation, ...]
    """All that is left of it: held as long as the parameter, for graphs that are yet to be compiled."""


_freed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_PLAIN = (Tensor, Parameter, torch.nn.Buffer)
_guarded: weakref.WeakSet[Module] = weakref.WeakSet()
_hooked: weakref.WeakSet[Module] = weakref.WeakSet()


def note_readers(module: GraphModule, weights: DerivedWeights) -> None:
    """Remember which parameters a lowered graph reads, as long as `weights` lives.

    Raises:
        ReleasedWeightError: it reads one that was freed.
    """
    reads = []
    for position, node in enumerate(module.graph.find_nodes(op="placeholder")):
        parameter = weights.inputs[position] if position < len(weights.inputs) else None
        if not node.users or not isinstance(parameter, Parameter):
            continue
        if is_released(parameter):
            user = next(iter(node.users))
            raise ReleasedWeightError(
                f"{parameter_path(node)} was freed by option 'release_weights', and this graph reads it (in"
                f" {user.name}). Compile every graph of a model with the same passes, or load the model again"
            )
        reads.append(position)
        _readers.setdefault(parameter, weakref.WeakSet()).add(weights)
    weights.reads = tuple(reads)


def check_call(weights: DerivedWeights, inputs: Sequence[Any]) -> None:
    """Raise ReleasedWeightError if a call hands a graph a freed parameter that it reads.

    Code compiled for one module also runs for others of its class, whose parameters it never saw.
    """
    if len(_freed):
        refuse_released([inputs[i] for i in weights.reads])


def refuse_released(inputs: Sequence[Any]) -> None:
    """Raise ReleasedWeightError if a graph that runs as it was captured would read a freed parameter."""
    for value in inputs:
        if isinstance(value, Parameter) and is_released(value):
            raise ReleasedWeightError(
                f"{_message(value)}, and this graph runs without the passes that replaced it"
            )


def release(module: GraphModule, weights: DerivedWeights) -> PassResult:
    """Free what passes replaced or left unread, if no compiled graph reads it any more.

    Args:
        module: the lowered graph.
        weights: its constants, materialised.

    Returns:
        A record for each parameter: the bytes freed, or why it was kept.
    """
    result = PassResult()
    sources = {position for entry in weights.entries for position in entry.inputs}
    nodes = list(module.graph.find_nodes(op="placeholder"))
    unread = module.meta.get(UNREAD, frozenset())
    sources |= {i for i, node in enumerate(nodes) if node.name in unread and not node.users}
    found = [(nodes[i], weights.inputs[i]) for i in sorted(sources) if not is_released(weights.inputs[i])]
    if not found:
        return result
    modules = [o for o in gc.get_objects() if issubclass(type(o), Module)]
    shared = _shared_memory(modules, [parameter for _, parameter in found])
    freed = []
    for node, parameter in found:
        reason = _why_kept(parameter, shared)
        if reason is not None:
            result.reject(NAME, node, f"{parameter_path(node)} stays: {reason}")
            continue
        freed.append(parameter)
        result.apply(
            NAME, "parameter", node, f"{parameter_path(node)}: {parameter.untyped_storage().nbytes()} bytes"
        )
        _free(parameter, parameter_path(node))
    _guard(modules, freed)
    _return_to_system()
    return result


def _why_kept(parameter: Parameter, shared: set[int]) -> str | None:
    memory = parameter.untyped_storage()
    if len(_readers.get(parameter, ())):
        return "a compiled graph reads the original"
    if not memory.resizable():
        return (
            "its memory belongs to something else, such as a mapped file; copy the model's parameters first"
        )
    if memory._cdata in shared or memory.nbytes() != parameter.numel() * parameter.element_size():
        return "another tensor shares its memory"
    return None


def _shared_memory(modules: Iterable[Module], parameters: Sequence[Parameter]) -> set[int]:
    """Addresses of the storages of `parameters` that a tensor of some module has as well."""
    owner = {p.untyped_storage()._cdata: p for p in parameters}
    shared = {p.untyped_storage()._cdata for p in parameters if owner[p.untyped_storage()._cdata] is not p}
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or type(tensor) not in _PLAIN or tensor.layout != torch.strided:
                continue
            memory = tensor.untyped_storage()._cdata
            if memory in owner and owner[memory] is not tensor:
                shared.add(memory)
    return shared


def _free(parameter: Parameter, path: str) -> None:
    derivations = derivations_of(parameter)
    for derivation in derivations:
        derivation.refresh(derivation.parameters)
    parameter.untyped_storage().resize_(0)
    for derivation in derivations:
        derivation.settle()
    _freed[parameter] = _Freed(path, tuple(derivations))


def _return_to_system() -> None:
    """Give freed pages back. glibc keeps them: a 4-bit Llama, 325 MB in bfloat16, stayed at 1.5x of that."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in other C libraries
        if trim is not None:
            trim(0)


def _guard(modules: Iterable[Module], freed: Sequence[Parameter]) -> None:
    """Give every module that holds a freed parameter, itself or further in, checks before it uses one."""
    identities = {id(p) for p in freed}
    for module in modules:
        own = any(id(p) in identities for p in module._parameters.values())
        if module in _guarded or not (own or any(id(p) in identities for p in module.parameters())):
            continue
        if module not in _hooked:
            _hooked.add(module)
            module.register_state_dict_pre_hook(_before_state_dict)
            module.register_load_state_dict_pre_hook(_before_load)
            module.register_forward_pre_hook(_before_forward)
        _guarded.add(module)
        module._apply = _Guarded(module, "_apply")  # type: ignore[method-assign]
        module.__reduce_ex__ = _Guarded(module, "__reduce_ex__")  # type: ignore[method-assign]


class _Guarded:
    """A method of one module that raises while a parameter of the module is freed."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = weakref.ref(module), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        assert module is not None
        _refuse(module, "it cannot be moved, cast, copied or pickled")
        # Whole again: what is copied or pickled now is the module as it was, bound to no other.
        _guarded.discard(module)
        for name in ("_apply", "__reduce_ex__"):
            module.__dict__.pop(name, None)
        method: Callable[..., Any] = getattr(type(module), self.name)
        return method(module, *args, **kwargs)


def _before_state_dict(module: Module, prefix: str, keep_vars: bool) -> None:
    _refuse(module, "it has no state to save")


def _before_load(module: Module, state_dict: Any, prefix: str, metadata: Any, *_: Any) -> None:
    if not metadata.get("assign_to_params_buffers"):
        _refuse(module, "nothing can be copied into it; use load_state_dict(..., assign=True)")


def _before_forward(module: Module, args: Any) -> None:
    # A compiled forward is called from an eager `__call__`; what is being traced reads no memory.
    if torch.compiler.is_compiling() or hasattr(module.forward, "_torchdynamo_orig_callable"):
        return
    for parameter in module._parameters.values():
        if parameter is not None and is_released(parameter):
            raise ReleasedWeightError(
                f"{_message(parameter)}: this {type(module).__name__} cannot run eagerly"
            )


def _refuse(module: Module, what: str) -> None:
    for parameter in module.parameters():
        if is_released(parameter):
            raise ReleasedWeightError(f"{_message(parameter)}: {what}")


def _message(parameter: Tensor) -> str:
    found = _freed.get(parameter)
    path = found.path if found is not None else f"a parameter of shape {list(parameter.shape)}"
    return f"{path} was freed by option 'release_weights'; call the compiled model, or load the model again"
