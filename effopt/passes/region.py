"""Passes that decide layer by layer, once for all graphs of a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from effopt.errors import PlanError
from effopt.graph.analyses.layers import Layer, Stack, stacks
from effopt.graph.release import REPLACES, UNREAD
from effopt.graph.rewrite import PassResult, Reject
from effopt.passes.base import Context, PlannedPass
from effopt.passes.plan import Section, describe, parameters_of
from effopt.passes.plans import Plans


@dataclass(frozen=True)
class RegionPass(PlannedPass):
    """A pass over the layers of a model: it decides, for each, and then does what was decided.

    The layers are found by structure (`graph/analyses/layers.py`). The decisions come from a plan, if
    one is given, else from `decide`; they are the same in every graph of the model, or an error.
    """

    provides: ClassVar[tuple[str, ...]] = (REPLACES,)
    is_scored: ClassVar[bool] = False
    """Whether `decide` needs scores, which only `effopt.calibrate` measures."""
    scores_parts: ClassVar[bool] = False
    """Whether a layer's score is a list, of its heads say: the last dimension of what `score` gives."""

    def observe(self, layer: Layer) -> tuple[Node, ...]:
        """The values of a layer that `score` looks at; none, and the layer has no score.

        Called once for each layer. It may add nodes that compute values, of a graph that is thrown away.
        """
        return (layer.entry, layer.exit)

    def score(self, *values: torch.Tensor) -> torch.Tensor:
        """Scores of one batch, any shape: their mean over all batches is the layer's score."""
        raise NotImplementedError(f"{self.name} is scored and has no score")

    @abstractmethod
    def decide(self, stack: Stack, scores: Sequence[Any] | None, result: PassResult) -> Sequence[Any]:
        """What to do with each layer, as JSON; None leaves a layer as it is.

        Args:
            stack: the layers.
            scores: of each layer, if `is_scored`: a number, or a list of them if `scores_parts`; None for one
                without.
            result: takes the reason for each layer that is left although it was asked for.
        """

    @abstractmethod
    def enact(self, stack: Stack, decisions: Sequence[Any], graph: Graph, result: PassResult) -> None:
        """Do what was decided. Raises `Reject`, before any edit, if this graph does not allow it."""

    def choices(
        self, module: GraphModule, context: Context, result: PassResult
    ) -> Mapping[str, Sequence[Any]]:
        """What `choices_in` says of the layers of every stack."""
        found = stacks(module.graph)
        for node, reason in found.refused:
            result.reject(self.name, node, reason)
        return {
            layer.path: given
            for stack in found
            for layer, given in zip(stack.layers, self.choices_in(stack, result), strict=True)
        }

    def choices_in(self, stack: Stack, result: PassResult) -> Sequence[Sequence[Any]]:
        """What may be decided for each layer alone; by default what `decide` says, unless it needs scores."""
        if self.is_scored:
            raise NotImplementedError(f"{self.name} decides on scores: its choices must be given")
        return [() if decision is None else (decision,) for decision in self.decide(stack, None, result)]

    def decide_together(self, stack: Stack, asked: Mapping[str, Any], result: PassResult) -> Sequence[Any]:
        """Decisions for choices taken together, some of them of layers that are gone by now.

        Args:
            stack: the layers that are there.
            asked: layer path -> one of its `choices_in`.
            result: takes the reason for each one that the others leave no room for.
        """
        return [asked.get(layer.path) for layer in stack.layers]

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Decide and enact over every stack of layers. Raises PlanError; nothing is half-applied."""
        result = PassResult()
        decided = module.meta.get("effopt_decided", frozenset())
        if self.name in decided:  # a share of the layers is one of all that there were
            return result
        module.meta["effopt_decided"] = decided | {self.name}
        found = stacks(module.graph)
        for node, reason in found.refused:
            result.reject(self.name, node, reason)
        if not found.found and not found.refused:
            result.reject(self.name, module.graph.output_node(), "no stack of layers was found in this graph")
        chosen = [self._decisions(stack, context.plans, result) for stack in found]
        section = context.plans.section(self.name)
        if section is not None:
            section.refuse_other_layers(module.graph, found)
        scores = context.plans.scores.get(self.name, {})
        described = [
            describe(stack, decisions, [scores.get(layer.path) for layer in stack.layers])
            for stack, decisions in zip(found, chosen, strict=True)
        ]
        context.plans.decided.append(Section(self.spec(), tuple(described)))
        parameters = parameters_of(module.graph, context.weights.inputs)
        if context.plans.asked is None:
            context.plans.settle(self.spec(), parameters, found.found)
        read = {node for node in parameters if node.users}
        for stack, decisions in zip(found, chosen, strict=True):
            if all(decision is None for decision in decisions):
                continue
            try:
                self.enact(stack, decisions, module.graph, result)
            except Reject as why:
                where = f" (at {why.node.name})" if why.node is not None else ""
                raise PlanError(f"{self.spec()} cannot be carried out in this graph: {why}{where}") from why
        if any(decision is not None for decisions in chosen for decision in decisions):
            # What nothing reads any more is no weight to quantise, and no site to report.
            module.graph.eliminate_dead_code()
        unread = {node.name for node in read if not node.users}
        module.meta[UNREAD] = module.meta.get(UNREAD, frozenset()) | unread
        return result

    def _decisions(self, stack: Stack, plans: Plans, result: PassResult) -> Sequence[Any]:
        section = plans.section(self.name)
        if section is not None:
            return section.decisions_for(stack)
        if plans.asked is not None:
            return self.decide_together(stack, plans.asked.get(self.name, {}), result)
        scores = plans.scores.get(self.name)
        if self.is_scored and scores is None:
            raise PlanError(
                f"{self.name} needs a plan: plan = effopt.calibrate(model, batches, {self.spec()!r}),"
                ' then options={"plans": plan}'
            )
        measured = [scores[layer.path] for layer in stack.layers] if scores is not None else None
        return self.decide(stack, measured, result)
