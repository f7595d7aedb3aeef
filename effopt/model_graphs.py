"""The graphs of a model: captured once, run eagerly in as many transformed forms as one likes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule

from effopt.errors import EffoptError
from effopt.graph.capture import Captured, capture, copy_graph
from effopt.graph.restore import restore
from effopt.graph.weights import DerivedWeights
from effopt.graph.weights import Entry as Constant
from effopt.passes.base import Context, Pass
from effopt.passes.plans import Plans
from effopt.target import target_of_inputs


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call: a mapping of keyword ones, a tuple of positional ones, or one tensor."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def run_calls(model: Callable[..., Any], batches: Iterable[Any], backend: Callable[..., Any]) -> None:
    """Call a model, without gradients, on each of `batches`, compiled by `backend`."""
    compiled = torch.compile(model, backend=backend)
    # A backend made for this call is compiled for anew, however often the model was compiled before.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=sys.maxsize):
        for batch in batches:
            args, kwargs = as_call(batch)
            compiled(*args, **kwargs)


def transformed(
    module: GraphModule, inputs: Sequence[Any], pipeline: Sequence[Pass], plans: Plans
) -> GraphModule:
    """The graph that Dynamo gave, after `pipeline`, runnable as it stands."""
    return CapturedGraph.of(module, inputs).form(pipeline, plans).runnable()


@dataclass
class GraphForm:
    """A graph after some passes, until `runnable` takes it to its last form."""

    captured: Captured
    weights: DerivedWeights
    context: Context

    def runnable(self) -> GraphModule:
        """Its constants computed, with the effects and outputs of the graph that was captured."""
        self.weights.materialize(self.captured.module)
        return restore(self.captured, runs_eagerly=True)


@dataclass(frozen=True)
class CapturedGraph:
    """A graph of a model in normal form, from which any number of forms are made."""

    captured: Captured
    inputs: Sequence[Any]
    """Those of the call that it was captured for, parameters included."""
    entries: Sequence[Constant] = ()
    """Its derived constants, if passes were applied to it."""

    @staticmethod
    def of(module: GraphModule, inputs: Sequence[Any]) -> CapturedGraph:
        """The graph that Dynamo gave. Raises CaptureRefused."""
        return CapturedGraph(capture(module, inputs), inputs)

    def after(self, passes: Sequence[Pass], plans: Plans) -> CapturedGraph:
        """The graph after passes that many forms begin with."""
        form = self.form(passes, plans)
        return CapturedGraph(form.captured, self.inputs, form.weights.entries)

    def form(self, pipeline: Sequence[Pass], plans: Plans) -> GraphForm:
        """A copy after `pipeline`."""
        form = self.begin(plans)
        for pass_ in pipeline:
            pass_.apply(form.captured.module, form.context)
        return form

    def begin(self, plans: Plans) -> GraphForm:
        """A copy that passes may be applied to."""
        original = self.captured.module
        module = GraphModule(original, copy_graph(original.graph))
        module.meta.update(original.meta)
        module.graph.output_node().meta.update(original.graph.output_node().meta)
        weights = DerivedWeights(self.inputs, list(self.entries))
        target = target_of_inputs(self.inputs)
        context = Context(target, self.captured.training, lambda *_: None, weights, plans)
        return GraphForm(replace(self.captured, module=module), weights, context)


@dataclass(eq=False)
class ModelGraphs:
    """A model that Dynamo compiles once, and whose graphs then run in the form of the moment.

    Graph breaks, several shapes and nested outputs are as in the compiled model, for the code around the
    graphs is Dynamo's.
    """

    model: Callable[..., Any]
    graphs: list[CapturedGraph] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._current: Callable[[int], Callable[..., Any]] | None = None
        self._failure: EffoptError | None = None
        self._compiled = torch.compile(self.model, backend=self._capture)

    def _capture(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            self.graphs.append(CapturedGraph.of(module, inputs))
        except EffoptError as error:  # Dynamo would wrap it in an error of its own
            self._failure = error
            return module.forward
        index = len(self.graphs) - 1

        def run(*given: Any) -> Any:
            if self._current is None:
                return module(*given)
            # Casts are nodes of the captured graph; autocast would make them a second time.
            with torch._C._DisableAutocast():
                return self._current(index)(*given)

        return run

    def call(self, batch: Any, runnable: Callable[[int], Callable[..., Any]] | None = None) -> Any:
        """What the model gives for a batch, without gradients.

        Args:
            batch: see `as_call`.
            runnable: what runs in place of each graph, by its position in `graphs`; None: the graph itself.

        Raises:
            EffoptError: a graph that cannot be captured, or what `runnable` raises.
        """
        args, kwargs = as_call(batch)
        self._current = runnable
        try:
            with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=sys.maxsize):
                result = self._compiled(*args, **kwargs)
        finally:
            self._current = None
        if self._failure is not None:
            raise self._failure
        return result
