"""Constants derived from parameters: packed, merged, quantised.

A derived constant is computed once from real parameters, held as a buffer of the lowered module,
and computed again when one of its sources changes in place (seen by the version counter).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from effopt.graph.values import fake_mode_of

Derive = Callable[..., Tensor]


@dataclass
class Derived:
    """One derived constant and what it was made from."""

    name: str
    sources: tuple[int, ...]
    """Positions of the source parameters among the graph's inputs."""
    derive: Derive
    versions: tuple[Any, ...] = ()
    """What `_state` was of the sources when the constant was computed."""

    def refresh(self, module: torch.nn.Module, inputs: Sequence[Any]) -> None:
        """Recompute if a source has changed since, in place so that compiled code sees it."""
        tensors = [inputs[i] for i in self.sources]
        if not all(_is_in_state(t, was) for t, was in zip(tensors, self.versions, strict=True)):
            with torch.no_grad():
                getattr(module, self.name).copy_(self.derive(*(t.detach() for t in tensors)))
            self.versions = tuple(_state(t) for t in tensors)


@dataclass
class DerivedWeights:
    """The derived constants of one graph. `inputs` are the real example inputs of the compile call."""

    inputs: Sequence[Any] = ()
    entries: list[Derived] = field(default_factory=list)
    cache: dict[Any, Tensor] = field(default_factory=dict)
    """Shared by the graphs of one model: (kind, source tensors) -> derived tensor."""

    def is_weight(self, node: Any) -> bool:
        """Whether a node is a real parameter that a constant can be derived from."""
        return self._position(node) is not None

    def _position(self, node: Any) -> int | None:
        if not isinstance(node, Node) or node.op != "placeholder":
            return None
        position = list(node.graph.find_nodes(op="placeholder")).index(node)
        if position >= len(self.inputs):
            return None
        return position if isinstance(self.inputs[position], torch.nn.Parameter) else None

    def derive(self, module: GraphModule, kind: str, derive: Derive, *sources: Node) -> Node:
        """A node that reads `derive(*sources)`, computed now and kept up to date.

        Args:
            module: the graph module that gets the constant.
            kind: names the derivation; with the sources it is the cache key.
            derive: function of the source tensors, without gradient.
            sources: placeholder nodes of parameters.
        """
        positions = tuple(self._position(s) for s in sources)
        if any(p is None for p in positions):
            raise ValueError(f"{kind}: derived constants need parameters as sources, got {sources}")
        tensors = [self.inputs[p] for p in positions if p is not None]
        key = (kind, *(id(t) for t in tensors))
        if key not in self.cache:
            with torch.no_grad():
                self.cache[key] = derive(*(t.detach() for t in tensors))
        name = f"_derived_{len(self.entries)}"
        module.register_buffer(name, self.cache[key])
        versions = tuple(_state(t) for t in tensors)
        self.entries.append(Derived(name, tuple(p for p in positions if p is not None), derive, versions))
        last_placeholder = list(module.graph.find_nodes(op="placeholder"))[-1]
        with module.graph.inserting_after(last_placeholder):
            node = module.graph.get_attr(name)
        mode = last_placeholder_mode(module)
        node.meta["val"] = mode.from_tensor(self.cache[key]) if mode else self.cache[key]
        return node


def _state(source: Tensor) -> tuple[Any, int, int]:
    """What changes when a parameter is written, replaced (`module.weight = ...`) or given other `.data`."""
    return weakref.ref(source), source.data_ptr(), source._version


def _is_in_state(source: Tensor, was: tuple[Any, int, int]) -> bool:
    reference, pointer, version = was
    return reference() is source and source.data_ptr() == pointer and source._version == version


def last_placeholder_mode(module: GraphModule) -> Any:
    """The fake mode of the graph's inputs, or None."""
    return fake_mode_of([n.meta.get("val") for n in module.graph.find_nodes(op="placeholder")])
