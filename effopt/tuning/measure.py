"""A model with some choices made: its figures on a split, and what one call of it is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from effopt import pipeline as pipelines
from effopt.errors import PlanError, QualityError
from effopt.graph.analyses.roofline import roofline
from effopt.model_graphs import CapturedGraph, GraphForm, ModelGraphs, as_call
from effopt.passes.base import Pass
from effopt.passes.plan import Entry, Plan, PlannedSites, Section
from effopt.passes.plans import Plans
from effopt.plugins.manager import Registry
from effopt.quality.logits import logits_of, row_sums
from effopt.tuning.batches import Batch
from effopt.tuning.search import Choice, Infeasible

OBJECTIVES = ("seconds", "bytes", "flops")


@dataclass(frozen=True)
class Cost:
    """Predicted of one call of each graph, every op a kernel of its own (`graph/analyses/roofline.py`)."""

    seconds: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.bytes + other.bytes, self.flops + other.flops)

    def of(self, objective: str) -> float:
        """The figure that is to fall."""
        return float(getattr(self, objective))


@dataclass
class Candidate:
    """The graphs of a model under one set of decisions, each made when it is first needed."""

    graphs: ModelGraphs
    begin: Callable[[int], CapturedGraph]
    """Position of a graph -> what is transformed."""
    pipeline: Sequence[Pass]
    plans: Plans
    """As they are before a graph; each graph gets its own copy."""
    registry: Registry
    forms: dict[int, GraphForm] = field(default_factory=dict)
    costs: dict[int, Cost] = field(default_factory=dict)
    modules: dict[int, GraphModule] = field(default_factory=dict)

    def form(self, index: int) -> GraphForm:
        """One graph, transformed."""
        if index not in self.forms:
            form = self.begin(index).form(self.pipeline, replace(self.plans, decided=[]))
            form.captured.module.graph.eliminate_dead_code()
            counted = roofline(form.captured.module.graph, self.registry.ops)
            seconds = counted.seconds(form.context.target)
            self.forms[index], self.costs[index] = form, Cost(seconds, counted.bytes_moved, counted.flops)
        return self.forms[index]

    def runnable(self, index: int) -> Callable[..., Any]:
        """One graph, to be called."""
        if index not in self.modules:
            self.modules[index] = self.form(index).runnable()
        return self.modules[index]

    def cost(self) -> Cost:
        """Of all graphs that the model has."""
        for index in range(len(self.graphs.graphs)):
            self.form(index)
        return sum(self.costs.values(), Cost())

    def decided(self) -> list[list[Section]]:
        """What was decided in each graph."""
        return [self.form(i).context.plans.decided for i in range(len(self.graphs.graphs))]


class Split:
    """Batches, and what the uncompressed model says of them."""

    def __init__(self, model: Callable[..., Any], batches: Sequence[Batch]) -> None:
        self.batches, self.runs = batches, 0
        self.wanted: list[Tensor] = []
        with torch.no_grad():
            for batch in batches:
                args, kwargs = as_call(batch.call)
                logits = logits_of("model", model(*args, **kwargs), batch.tokens)
                if bool(logits.isnan().any()):
                    raise QualityError("the uncompressed model gives logits that are NaN")
                self.wanted.append(logits)

    def figures(self, candidate: Candidate) -> dict[str, float]:
        """`kl`, `agreement` and `bits_per_byte` of a candidate. NaN and infinity are figures too.

        Raises:
            Infeasible: a graph that cannot carry out what was decided.
        """
        self.runs += 1
        sums = torch.zeros(3, dtype=torch.float64)
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            try:
                result = candidate.graphs.call(batch.call, candidate.runnable)
            except PlanError as why:
                raise Infeasible(str(why)) from why
            logits = logits_of("compressed model", result, batch.tokens)
            rows = row_sums(logits, wanted, batch.targets, batch.counted)
            sums += torch.stack([s.sum() for s in rows if s is not None])
        tokens = sum(int(batch.counted.sum()) for batch in self.batches)
        nats, agreed, kl = sums.tolist()
        total_bytes = sum(batch.byte_count for batch in self.batches)
        return {
            "kl": kl / tokens,
            "agreement": agreed / tokens if math.isfinite(kl) else math.nan,
            "bits_per_byte": nats / math.log(2) / total_bytes,
        }


class Subject:
    """The model that is tuned: captured once, then tried with one set of choices after another."""

    def __init__(self, model: Callable[..., Any], bases: Sequence[Pass], registry: Registry) -> None:
        self.registry = registry
        names = {base.name for base in bases}
        pipeline = pipelines.build(registry, passes=list(bases))
        first = next(i for i, pass_ in enumerate(pipeline) if pass_.name in names)
        self.prefix, self.rest = pipeline[:first], pipeline[first:]
        self.graphs = ModelGraphs(model)
        self._begun: dict[int, CapturedGraph] = {}

    def begin(self, index: int) -> CapturedGraph:
        """A graph after the exact passes that all candidates begin with."""
        if index not in self._begun:
            self._begun[index] = self.graphs.graphs[index].after(self.prefix, Plans())
        return self._begun[index]

    def candidate(
        self, choices: Sequence[Choice], scores: Mapping[str, Mapping[str, float]] | None = None
    ) -> Candidate:
        """The model with these choices; `scores` go into what is decided."""
        asked: dict[str, dict[str, Any]] = {}
        for choice in choices:
            name, path = choice.site
            asked.setdefault(name, {})[path] = choice.decision
        plans = Plans(asked=asked, scores=scores or {})
        return Candidate(self.graphs, self.begin, self.rest, plans, self.registry)

    def planned(self, plan: Plan) -> Candidate:
        """The model as `options={"plans": plan}` makes it: through its own pipeline, from the start."""
        pipeline = pipelines.build(self.registry, plans=(plan,))
        plans = Plans((plan,), pipeline=pipelines.text_of(pipeline))
        return Candidate(self.graphs, self.graphs.graphs.__getitem__, pipeline, plans, self.registry)


def plan_of(base: Candidate, chosen: Candidate) -> Plan:
    """What was decided in all graphs, as a plan. Sites that are gone, as those of a skipped layer, stay in it
    as they are: a graph that has them for their effects runs them so.
    """
    sections: dict[str, Section] = {}
    for before, after in zip(base.decided(), chosen.decided(), strict=True):
        known = {section.name: section for section in before}
        for section in after:
            graphs = tuple(
                PlannedSites(tuple(_entry(e, section) for e in graph.sites))
                for graph in known[section.name].graphs
            )
            old = sections.get(section.name, Section(section.spec))
            stacks = [s for s in section.stacks if s not in old.stacks]
            sections[section.name] = Section(
                section.spec,
                (*old.stacks, *stacks),
                (*old.graphs, *(g for g in graphs if g not in old.graphs)),
            )
    changing = (s for s in sections.values() if any(e.decision is not None for e in s.entries))
    return Plan(tuple(changing))


def _entry(was: Entry, section: Section) -> Entry:
    return next((e for e in section.entries if e.path == was.path), replace(was, decision=None))
