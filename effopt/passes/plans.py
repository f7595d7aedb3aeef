"""The plans of one compile call, and what holds all graphs of a model to the same decisions.

What was decided is remembered by parameter, as long as it lives: a graph that decides otherwise for the layer
of one is an error, not a mixture of two models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.weak import WeakTensorKeyDictionary

from effopt.errors import OptionError, PlanError
from effopt.graph.analyses.layers import Stack
from effopt.passes.plan import Plan, Section


@dataclass
class Plans:
    """The plans of one compile call: those given, what was measured or asked, and what was decided."""

    given: tuple[Plan, ...] = ()
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Pass name -> path of a layer or site -> score, a number or a list, while a plan is made."""
    asked: Mapping[str, Mapping[str, Any]] | None = None
    """Pass name -> path -> decision, while `effopt.tune` tries them: all else is left. None otherwise."""
    decided: list[Section] = field(default_factory=list)
    """The decisions taken in this graph, in the order of the passes."""
    pipeline: str = ""
    """Text of the pipeline. Under one pipeline and one plan, all graphs of a model must agree."""

    @property
    def identity(self) -> str:
        """Equal for compile calls whose decisions must agree."""
        return "|".join((self.pipeline, *(plan.to_json() for plan in self.given)))

    def section(self, name: str) -> Section | None:
        """What a given plan says for a pass."""
        return next((s for plan in self.given for s in plan.sections if s.name == name), None)

    def settle(self, spec: str, parameters: Mapping[Any, Any], stacks: Sequence[Stack]) -> None:
        """Check the decisions against the other graphs of the model, and remember them.

        Args:
            spec: text form of the pass; its decisions are the last of `decided`.
            parameters: placeholder -> the real parameter.
            stacks: those that were decided, in the order of the section.

        Raises:
            PlanError: another graph of this model, in this pipeline, decided otherwise.
        """
        # A graph may hold parameters that it does not read: a projection whose cache is another layer's.
        fates: dict[Any, dict[int, Any]] = {p: {} for node, p in parameters.items() if node.users}
        paths: dict[Any, str] = {}
        for stack, planned in zip(stacks, self.decided[-1].stacks, strict=True):
            for position, (layer, entry) in enumerate(zip(stack.layers, planned.layers, strict=True)):
                for operand in (a for node in layer.nodes for a in node.all_input_nodes):
                    if operand in parameters:
                        fates[parameters[operand]][position] = entry.decision
                        paths[parameters[operand]] = entry.path
        for parameter, fate in fates.items():
            was = _settled.setdefault(parameter, {}).setdefault((self.identity, spec), fate)
            if was != fate:
                raise PlanError(
                    f"{spec}: layer {paths.get(parameter, '')!r} {_told(was)} in an earlier graph of this"
                    f" model and {_told(fate)} in this one, which would mix two models. Make one plan for all"
                    f" graphs: effopt.calibrate(model, batches, {spec!r}); or compile the model as one graph"
                )


_settled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> (identity of `Plans`, pass) -> position in its stack -> decision."""


def _told(fate: Mapping[int, Any]) -> str:
    if not fate:
        return "was in no stack of layers"
    decisions = [d for d in fate.values() if d is not None]
    return f"was decided {json.dumps(decisions[0])}" if decisions else "stayed as it is"


def plans_from(given: Any) -> tuple[Plan, ...]:
    """What option `plans` holds: a plan, or several. Raises OptionError."""
    plans = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for plan in plans:
        if not isinstance(plan, Plan):
            raise OptionError(
                "option 'plans' must hold plans of effopt.calibrate, effopt.tune or effopt.Plan.load, got"
                f" {plan!r} ({type(plan).__name__})"
            )
    names = [section.name for plan in plans for section in plan.sections]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise OptionError(f"option 'plans' holds two plans for {twice!r}")
    return plans
