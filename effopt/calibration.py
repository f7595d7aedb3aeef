"""Makes a plan: which layers, decided from the model and from batches of real data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from effopt import pipeline as pipelines
from effopt.errors import OptionError, PlanError
from effopt.graph.analyses.layers import Layer, stacks
from effopt.model_graphs import run_calls, transformed
from effopt.passes.base import Pass
from effopt.passes.plan import Plan, Section
from effopt.passes.plans import Plans
from effopt.passes.region import RegionPass
from effopt.plugins.manager import build_registry


def calibrate(model: Callable[..., Any], batches: Iterable[Any], passes: Any, *, plugins: Any = ()) -> Plan:
    """Decide what lossy passes do to each layer of a model, and write it down.

    The batches are run one after the other, without gradients, and only sums are kept of them; the first
    is run once more, to decide. The model is run in its mode of the moment: call `model.eval()` first if it
    has dropout.

    Args:
        model: a module, or a function of tensors.
        batches: inputs of calls: mappings of keyword arguments, tuples of positional ones, or tensors.
        passes: text, names or instances of passes that decide by layer, such as `drop-layers{keep=0.75}`.
        plugins: plugin objects for this call only.

    Returns:
        A plan to save, print, or hand over as `options={"plans": plan}`.

    Raises:
        OptionError: an unknown pass, or one that does not decide by layer.
        PlanError: no batches, no layers found, or a score that is not finite.
    """
    registry = build_registry(tuple(plugins))
    asked = pipelines.resolve(passes, registry)
    for pass_ in asked:
        if not isinstance(pass_, RegionPass):
            raise OptionError(f"{pass_.name} decides nothing by layer, so there is nothing to calibrate")
    pipeline = pipelines.build(registry, passes=asked)
    scored = [p for p in asked if isinstance(p, RegionPass) and p.is_scored]
    calls = iter(batches)
    first = next(calls, None)
    if first is None:
        raise PlanError("there are no batches to calibrate with; give at least one")
    scores = _scores(model, itertools.chain([first], calls), pipeline, scored) if scored else {}
    sections: list[Section] = []

    def decide(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        plans = Plans(scores=scores, pipeline=f"calibration {id(sections)}")
        runnable = transformed(module, inputs, pipeline, plans)
        _merge(sections, plans.decided)
        return runnable.forward

    run_calls(model, [first], decide)
    if not any(section.stacks for section in sections):
        raise PlanError("no stack of layers was found in the model; effopt.explain(model, ...) says why")
    return Plan(tuple(sections))


def _merge(sections: list[Section], found: Sequence[Section]) -> None:
    """Add the stacks of one more graph to the sections of the same passes."""
    for section in found:
        place = next((i for i, s in enumerate(sections) if s.spec == section.spec), None)
        if place is None:
            sections.append(section)
        else:
            sections[place] = Section(section.spec, (*sections[place].stacks, *section.stacks))


class _Means:
    """Mean score by pass and layer over everything seen, or of each part of a layer."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, torch.Tensor]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.unscored: dict[str, dict[str, None]] = {}
        """Layers that their pass looks at nothing of."""

    def add(self, pass_: RegionPass, path: str, scores: torch.Tensor) -> None:
        name = pass_.name
        if not scores.isfinite().all():
            raise PlanError(f"{name}: the score of layer {path!r} is not finite on a batch")
        sums, counts = self.sums.setdefault(name, {}), self.counts.setdefault(name, {})
        rows = scores.double().reshape((-1, scores.shape[-1]) if pass_.scores_parts else (-1,))
        sums[path] = sums.get(path, 0.0) + rows.sum(0)
        counts[path] = counts.get(path, 0) + len(rows)

    def result(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {name: dict(paths) for name, paths in self.unscored.items()}
        for name, sums in self.sums.items():
            means = {path: (total / self.counts[name][path]).tolist() for path, total in sums.items()}
            found[name] = found.get(name, {}) | means
        return found


class _Watch(Interpreter):
    """Runs a graph and scores the watched values as soon as the last of them is there."""

    def __init__(
        self, module: GraphModule, watched: Sequence[tuple[RegionPass, Layer]], means: _Means
    ) -> None:
        observed = [(pass_, layer.path, pass_.observe(layer)) for pass_, layer in watched]
        super().__init__(module)
        self.watched, self.means = [watch for watch in observed if watch[2]], means
        for pass_, path, _ in (watch for watch in observed if not watch[2]):
            means.unscored.setdefault(pass_.name, {})[path] = None
        self.wanted = {node for _, _, nodes in self.watched for node in nodes}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.seen: dict[Node, Any] = {}
        self.waiting = list(self.watched)
        return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = value
            for watch in [w for w in self.waiting if all(v in self.seen for v in w[2])]:
                pass_, path, nodes = watch
                self.means.add(pass_, path, pass_.score(*(self.seen[v] for v in nodes)))
                self.waiting.remove(watch)
            needed = {v for _, _, nodes in self.waiting for v in nodes}
            self.seen = {v: seen for v, seen in self.seen.items() if v in needed}
        return value


def _scores(
    model: Callable[..., Any], batches: Iterable[Any], pipeline: Sequence[Pass], scored: Sequence[RegionPass]
) -> dict[str, dict[str, Any]]:
    means = _Means()
    last = max(index for index, pass_ in enumerate(pipeline) if pass_ in scored)
    before = [pass_ for pass_ in pipeline[:last] if pass_.exact]

    def watch(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        runnable = transformed(module, inputs, before, Plans())
        layers = [layer for stack in stacks(runnable.graph) for layer in stack.layers]
        return _Watch(runnable, [(p, layer) for p in scored for layer in layers], means).run

    run_calls(model, batches, watch)
    return means.result()
