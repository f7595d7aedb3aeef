"""Constants derived from parameters: packed, merged, quantised, laid out for a kernel.

A derivation is a pure function of parameters, or of other derived constants. Passes and lowerings may ask
for many: only those that a graph still reads when it is compiled are computed. The graphs of a model share
them, and they are computed again, in place, when a parameter was written or replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from effopt.graph.derivation import Derivation, Derive, Part, State, is_in_state, shared
from effopt.graph.values import fake_call

_UPDATING = threading.RLock()
"""Held while constants are computed: graphs that other threads run may hold the same ones."""


@dataclass(frozen=True)
class Entry:
    """A buffer of the graph module, and the result that it is."""

    name: str
    derivation: Derivation
    index: int
    inputs: tuple[int, ...]
    """Positions of the derivation's parameters among the graph's inputs."""


@dataclass(eq=False)
class DerivedWeights:
    """The derived constants of one graph."""

    inputs: Sequence[Any] = ()
    """The real inputs of the compile call."""
    entries: list[Entry] = field(default_factory=list)
    reads: tuple[int, ...] = ()
    """Positions of the parameters that the compiled graph reads as they are."""
    _positions: dict[Node, int] = field(default_factory=dict)
    """Placeholders of the graph that was asked about last."""
    _last: tuple[tuple[tuple[int, State], ...], tuple[Tensor, ...]] = ((), ())
    """Inputs as they were, and the constants made of them: one value, for threads may share a graph."""
    _used: set[Derivation] = field(default_factory=set)
    """Keeps the constants of every module that the graph was called for."""

    def is_weight(self, node: Any) -> bool:
        """Whether a node is a real parameter that a constant can be derived from."""
        return self._position(node) is not None

    def is_constant(self, node: Any) -> bool:
        """Whether a constant can be derived from a node: it is a parameter, or derived itself."""
        return self.is_weight(node) or self._entry(node) is not None

    def parameter(self, node: Node) -> torch.nn.Parameter | None:
        """The real parameter that a placeholder reads, or None."""
        position = self._position(node)
        return None if position is None else self.inputs[position]

    def _position(self, node: Any) -> int | None:
        if not isinstance(node, Node) or node.op != "placeholder":
            return None
        if node not in self._positions:
            self._positions = {p: i for i, p in enumerate(node.graph.find_nodes(op="placeholder"))}
        position = self._positions[node]
        value = self.inputs[position] if position < len(self.inputs) else None
        # Writes to a tensor made in inference mode are not counted: what was derived from it could be stale.
        is_tracked = isinstance(value, torch.nn.Parameter) and not value.is_inference()
        return position if is_tracked else None

    def _entry(self, node: Any) -> Entry | None:
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        return next((e for e in self.entries if e.name == node.target), None)

    def derive(self, module: GraphModule, kind: str, derive: Derive, *sources: Node) -> Any:
        """Nodes that read `derive(*sources)`: one, or a tuple of them if it gives a tuple.

        Nothing is computed before `materialize`. Asking again for the same gives the same nodes.

        Args:
            module: the graph module that gets the constants.
            kind: names the derivation and all its settings; with the sources it is the key of sharing.
            derive: see `Derive`; without gradient.
            sources: nodes for which `is_constant` holds.
        """
        fakes = fake_call(derive, sources, {})
        is_tuple = isinstance(fakes, tuple)
        derivation, inputs = self._derivation(kind, derive, sources, len(fakes) if is_tuple else 1)
        known = {e.index: e.name for e in self.entries if e.derivation is derivation}
        nodes = []
        for index, fake in enumerate(fakes if is_tuple else (fakes,)):
            found = module.graph.find_nodes(op="get_attr", target=known.get(index, ""))
            if found:
                nodes.append(found[0])
                continue
            name = _free_name(module, len(self.entries))
            module.register_buffer(name, fake)
            self.entries.append(Entry(name, derivation, index, inputs))
            with module.graph.inserting_after(list(module.graph.find_nodes(op="placeholder"))[-1]):
                nodes.append(module.graph.get_attr(name))
            nodes[-1].meta["val"] = fake
        return tuple(nodes) if is_tuple else nodes[0]

    def _derivation(
        self, kind: str, derive: Derive, sources: Sequence[Node], count: int
    ) -> tuple[Derivation, tuple[int, ...]]:
        inputs: list[int] = []
        parts: list[int | Part] = []
        for source in sources:
            entry, position = self._entry(source), self._position(source)
            needed = entry.inputs if entry is not None else (position,)
            if None in needed:
                raise ValueError(f"{kind}: derived constants need parameters as sources, got {sources}")
            inputs.extend(i for i in needed if i is not None and i not in inputs)
            at = tuple(inputs.index(i) for i in needed if i is not None)
            parts.append(at[0] if entry is None else Part(entry.derivation, entry.index, at))
        parameters = [self.inputs[i] for i in inputs]
        return shared(kind, derive, tuple(parts), parameters, count), tuple(inputs)

    def evaluate(self, name: str, given: Mapping[int, Tensor]) -> Tensor:
        """What a constant would be if the input at each position were the tensor given for it."""
        entry = next(e for e in self.entries if e.name == name)
        return entry.derivation.evaluate([given[i] for i in entry.inputs])[entry.index]

    def materialize(self, module: GraphModule) -> None:
        """Compute the constants that the graph still reads, or take over those of another graph.

        Raises:
            ReleasedWeightError: a parameter that is needed was freed.
        """
        read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
        for entry in self.entries:
            if entry.name not in read:
                delattr(module, entry.name)
        self.entries = [entry for entry in self.entries if entry.name in read]
        for entry, tensor in zip(self.entries, self.tensors(self.inputs), strict=True):
            setattr(module, entry.name, tensor)

    def lift(self, module: GraphModule) -> tuple[Tensor, ...]:
        """Make the constants the last inputs of the graph; their fake values, whose sizes are known numbers.

        Code compiled for one module is called for others of its class, with their parameters: what it reads
        is chosen at each call, by `tensors`.
        """
        fakes = []
        for entry in self.entries:
            last = list(module.graph.find_nodes(op="placeholder"))[-1]
            (node,) = module.graph.find_nodes(op="get_attr", target=entry.name)
            with module.graph.inserting_after(last):
                lifted = module.graph.placeholder(entry.name)
            lifted.meta.update(node.meta)
            # Its memory stays where it is from call to call; what captures CUDA graphs needs not copy it.
            lifted.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node.replace_all_uses_with(lifted)
            module.graph.erase_node(node)
            delattr(module, entry.name)
            fakes.append(node.meta["val"])
        module.recompile()
        return tuple(fakes)

    def tensors(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """The constants for a call with these inputs, up to date. Raises ReleasedWeightError."""
        if not self.entries:
            return ()
        watched, last = self._last
        if last and all(is_in_state(inputs[position], was) for position, was in watched):
            return last
        with _UPDATING:
            return self._updated(inputs)

    def _updated(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        now: dict[Derivation, Derivation] = {}
        read: dict[Derivation, list[Entry]] = {}
        for entry in self.entries:
            read.setdefault(entry.derivation, []).append(entry)
        for derivation, entries in read.items():
            parameters = [inputs[i] for i in entries[0].inputs]
            now[derivation] = derivation.of(parameters)
            now[derivation].hold([e.index for e in entries], parameters)
        self._used = {d for d in self._used if not d.is_orphan} | set(now.values())
        made = tuple(now[e.derivation].held[e.index] for e in self.entries)
        states = {i: s for e in self.entries for i, s in zip(e.inputs, now[e.derivation].states, strict=True)}
        self._last = (tuple(states.items()), made)
        self.entries = [
            replace(e, derivation=now[e.derivation]) if e.derivation.is_orphan else e for e in self.entries
        ]
        return made

    def forget_inputs(self) -> None:
        """After compiling: keep no parameter alive that the model has replaced."""
        self.inputs, self._positions = (), {}


def _free_name(module: GraphModule, number: int) -> str:
    while hasattr(module, f"_derived_{number}"):
        number += 1
    return f"_derived_{number}"
