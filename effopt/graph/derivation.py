"""One derivation: tensors made from parameters, held as long as a graph reads them, and kept up to date."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from effopt.errors import ReleasedWeightError

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
    """What `state_of` was of each parameter when the held tensors were computed."""
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
        self.states = tuple(state_of(p) for p in parameters)

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
        return shared(self.kind, self.derive, sources, parameters, self.count)

    @property
    def is_orphan(self) -> bool:
        """Whether a parameter that it is made from is gone."""
        return any(p is None for p in self.parameters)

    def settle(self) -> None:
        """Take the parameters as they are now, freed perhaps, for what the held tensors were made of."""
        self.states = tuple(state_of(p) for p in self.parameters)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The parameters that it was last computed from. None for one that is gone."""
        return tuple(reference() for reference, *_ in self.states)

    def _is_current(self, parameters: Sequence[Tensor]) -> bool:
        return all(is_in_state(p, was) for p, was in zip(parameters, self.states, strict=True))

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


def shared(
    kind: str, derive: Derive, sources: tuple[int | Part, ...], parameters: Sequence[Tensor], count: int
) -> Derivation:
    """The one derivation of this kind from these sources: that of another graph, or a new one."""
    identities = ((id(s.of), s.index) if isinstance(s, Part) else _identity(parameters[s]) for s in sources)
    key = (kind, *identities)
    found = _SHARED.get(key)
    if found is None or not all(s[0]() is p for s, p in zip(found.states, parameters, strict=True)):
        found = Derivation(kind, derive, sources, tuple(state_of(p) for p in parameters), count)
        _SHARED[key] = found
    return found


def _identity(source: Tensor) -> tuple[Any, ...]:
    """Of a parameter, and of what cannot be written over what was derived from it before: `.to(dtype)`."""
    return id(source), source.dtype, source.device, tuple(source.shape)


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


def state_of(source: Tensor) -> State:
    """What changes when a parameter is written, replaced (`module.weight = ...`) or given other `.data`."""
    # As long as it is referred to, no other memory gets its address, as other `.data` may.
    memory = StorageWeakRef(source.untyped_storage())
    return weakref.ref(source), memory, source.data_ptr(), _version(source)


def _version(source: Tensor) -> int:
    return 0 if source.is_inference() else source._version


def is_in_state(source: Tensor, was: State) -> bool:
    """Whether a tensor is the one of a state, and was not written since."""
    reference, memory, pointer, version = was
    is_same: bool = (
        reference() is source
        and source.untyped_storage()._cdata == memory.cdata
        and source.data_ptr() == pointer
        and _version(source) == version
        and not source.is_inference()
    )
    return is_same
