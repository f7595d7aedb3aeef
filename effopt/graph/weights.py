"""Constants derived from parameters: packed, merged, quantised, laid out for a kernel.

A derivation is a pure function of parameters, or of other derived constants. Passes and lowerings may ask
for many: only those that a graph still reads when it is compiled are computed. The graphs of a model share
them, and they are computed again, in place, when a parameter was written or replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from effopt.errors import ReleasedWeightError
from effopt.graph.values import fake_call

Derive = Callable[..., Any]
"""Pure function of tensors: a tensor, or a tuple of them, whose shapes do not hang on values."""
State = tuple[Any, Any, int, int]


@dataclass(frozen=True)
class Part:
    """One result of a derivation, as the source of another."""

    of: Derivation
    index: int
    parameters: tuple[int, ...]
    """Where the parameters of `of` stand among those of the derivation that reads this."""


@dataclass(eq=False)
class Derivation:
    """Tensors made from parameters. `held` are those that a graph of this process reads."""

    kind: str
    derive: Derive
    sources: tuple[int | Part, ...]
    """Positions among the parameters, or results of other derivations."""
    states: tuple[State, ...]
    """What `_state` was of each parameter when the held tensors were computed."""
    count: int
    """Results of `derive`."""
    held: dict[int, Tensor] = field(default_factory=dict)

    def evaluate(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All results, from these tensors in place of the parameters."""
        return self._apply(parameters, Derivation.evaluate)

    def hold(self, wanted: Iterable[int], parameters: Sequence[Tensor]) -> None:
        """Compute and keep the results `wanted`. Raises ReleasedWeightError as `refresh` does."""
        self.refresh(parameters)
        missing = [index for index in wanted if index not in self.held]
        if missing:
            made = self._compute(parameters)
            self.held.update((i, _owned(made[i], parameters)) for i in missing)

    def refresh(self, parameters: Sequence[Tensor]) -> None:
        """Compute what is held again if a parameter changed since, in place so that compiled code sees it.

        Raises:
            ReleasedWeightError: a parameter that is needed was freed.
        """
        if self._is_current(parameters):
            return
        if self.held:
            made = self._compute(parameters)
            with torch.inference_mode(False), torch.no_grad():
                for index, tensor in self.held.items():
                    tensor.copy_(made[index])
        self.states = tuple(_state(p) for p in parameters)

    def of(self, parameters: Sequence[Tensor]) -> Derivation:
        """The same, made from these parameters: itself, or what any graph that is called with them reads."""
        if all(was[0]() is p for was, p in zip(self.states, parameters, strict=True)):
            return self
        sources = tuple(
            Part(s.of.of([parameters[i] for i in s.parameters]), s.index, s.parameters)
            if isinstance(s, Part)
            else s
            for s in self.sources
        )
        return _shared(self.kind, self.derive, sources, parameters, self.count)

    @property
    def is_orphan(self) -> bool:
        """Whether a parameter that it is made from is gone."""
        return any(p is None for p in self.parameters)

    def settle(self) -> None:
        """Take the parameters as they are now, freed perhaps, for what the held tensors were made of."""
        self.states = tuple(_state(p) for p in self.parameters)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The parameters that it was last computed from. None for one that is gone."""
        return tuple(reference() for reference, *_ in self.states)

    def _is_current(self, parameters: Sequence[Tensor]) -> bool:
        return all(_is_in_state(p, was) for p, was in zip(parameters, self.states, strict=True))

    def _compute(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if any(is_released(parameters[s]) for s in self.sources if isinstance(s, int)):
            shapes = ", ".join(str(list(p.shape)) for p in parameters)
            raise ReleasedWeightError(
                f"{self.kind} cannot be computed: its weight {shapes} was freed by option"
                " 'release_weights', and no graph holds it in this form. Compile every graph of a"
                " model with the same passes and options, or load the model again"
            )
        with torch.inference_mode(False), torch.no_grad():
            return self._apply(parameters, Derivation._results)

    def _results(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(self.held) == self.count and self._is_current(parameters):
            return tuple(self.held[i] for i in range(self.count))
        return self._compute(parameters)

    def _apply(
        self,
        parameters: Sequence[Tensor],
        resolve: Callable[[Derivation, Sequence[Tensor]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        made: dict[Derivation, tuple[Tensor, ...]] = {}
        operands = []
        for source in self.sources:
            if isinstance(source, int):
                operands.append(parameters[source].detach())
                continue
            if source.of not in made:
                made[source.of] = resolve(source.of, [parameters[i] for i in source.parameters])
            operands.append(made[source.of][source.index])
        result = self.derive(*operands)
        return result if isinstance(result, tuple) else (result,)


_SHARED: weakref.WeakValueDictionary[Any, Derivation] = weakref.WeakValueDictionary()
"""(kind, identities of the sources) -> derivation, as long as a graph reads it."""


def _shared(
    kind: str, derive: Derive, sources: tuple[int | Part, ...], parameters: Sequence[Tensor], count: int
) -> Derivation:
    identities = ((id(s.of), s.index) if isinstance(s, Part) else _identity(parameters[s]) for s in sources)
    key = (kind, *identities)
    found = _SHARED.get(key)
    if found is None or not all(s[0]() is p for s, p in zip(found.states, parameters, strict=True)):
        found = Derivation(kind, derive, sources, tuple(_state(p) for p in parameters), count)
        _SHARED[key] = found
    return found


def _identity(source: Tensor) -> tuple[Any, ...]:
    """Of a parameter, and of what cannot be written over what was derived from it before: `.to(dtype)`."""
    return id(source), source.dtype, source.device, tuple(source.shape)


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
    _watched: list[tuple[int, State]] = field(default_factory=list)
    """Inputs that `_last` was made from, as they were."""
    _last: tuple[Tensor, ...] = ()
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
        position = list(node.graph.find_nodes(op="placeholder")).index(node)
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
        return _shared(kind, derive, tuple(parts), parameters, count), tuple(inputs)

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
        wanted: dict[Derivation, list[Entry]] = {}
        for entry in self.entries:
            wanted.setdefault(entry.derivation, []).append(entry)
        for derivation, entries in wanted.items():
            derivation.hold([e.index for e in entries], [self.inputs[i] for i in entries[0].inputs])
            for entry in entries:
                setattr(module, entry.name, derivation.held[entry.index])

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
        if self._last and all(_is_in_state(inputs[position], was) for position, was in self._watched):
            return self._last
        now: dict[Derivation, Derivation] = {}
        wanted: dict[Derivation, list[int]] = {}
        for entry in self.entries:
            wanted.setdefault(entry.derivation, []).append(entry.index)
        for entry in self.entries:
            if entry.derivation not in now:
                parameters = [inputs[i] for i in entry.inputs]
                now[entry.derivation] = entry.derivation.of(parameters)
                now[entry.derivation].hold(wanted[entry.derivation], parameters)
        self._used = {d for d in self._used if not d.is_orphan} | set(now.values())
        self._last = tuple(now[e.derivation].held[e.index] for e in self.entries)
        states = {i: s for e in self.entries for i, s in zip(e.inputs, now[e.derivation].states, strict=True)}
        self._watched = list(states.items())
        self.entries = [
            replace(e, derivation=now[e.derivation]) if e.derivation.is_orphan else e for e in self.entries
        ]
        return self._last

    def forget_inputs(self) -> None:
        """After compiling: keep no parameter alive that the model has replaced."""
        self.inputs = ()


def derivations_of(parameter: Tensor) -> list[Derivation]:
    """All derivations of this process that read a parameter, and whose parameters are all there."""
    found = [d for d in _SHARED.values() if any(p is parameter for p in d.parameters)]
    return [d for d in found if all(p is not None for p in d.parameters)]


def is_released(source: Tensor) -> bool:
    """Whether a tensor was freed: it has elements and no memory."""
    if source.layout != torch.strided or not source.numel():
        return False
    return source.untyped_storage().nbytes() == 0


def _owned(tensor: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The tensor with memory of its own: it is written in place, and that of the parameters may be freed."""
    memory = tensor.untyped_storage()
    shares = any(p.untyped_storage()._cdata == memory._cdata for p in parameters)
    return tensor.clone() if shares or memory.nbytes() > tensor.numel() * tensor.element_size() else tensor


def _state(source: Tensor) -> State:
    """What changes when a parameter is written, replaced (`module.weight = ...`) or given other `.data`."""
    # As long as it is referred to, no other memory gets its address, as other `.data` may.
    memory = StorageWeakRef(source.untyped_storage())
    return weakref.ref(source), memory, source.data_ptr(), _version(source)


def _version(source: Tensor) -> int:
    return 0 if source.is_inference() else source._version


def _is_in_state(source: Tensor, was: State) -> bool:
    reference, memory, pointer, version = was
    is_same: bool = (
        reference() is source
        and source.untyped_storage()._cdata == memory.cdata
        and source.data_ptr() == pointer
        and _version(source) == version
        and not source.is_inference()
    )
    return is_same


def _free_name(module: GraphModule, number: int) -> str:
    while hasattr(module, f"_derived_{number}"):
        number += 1
    return f"_derived_{number}"
