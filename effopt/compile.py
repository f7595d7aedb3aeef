"""The Dynamo backend: capture, pipeline, lower, hand over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import GraphModule

from effopt import pipeline as pipelines
from effopt.backends import inductor
from effopt.backends.lower import lower
from effopt.errors import CaptureRefused
from effopt.graph.capture import Captured, capture, restore
from effopt.graph.weights import DerivedWeights
from effopt.options import Options
from effopt.passes.base import Context, Pass
from effopt.plugins.manager import Registry, build_registry
from effopt.plugins.report import GraphReport, LoweringRecord, Report
from effopt.target import target_of

_recording: ContextVar[tuple[Report, ...]] = ContextVar("effopt_recording", default=())


@contextmanager
def record() -> Iterator[Report]:
    """Gather the report of everything compiled inside."""
    report = Report()
    token = _recording.set((*_recording.get(), report))
    try:
        yield report
    finally:
        _recording.reset(token)


def effopt(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The `torch.compile` backend `effopt`.

    Args:
        module: the graph that Dynamo captured.
        inputs: its real inputs.
        options: see `effopt.options.Options`.
        mode: `mode=` of `torch.compile`, handed to Inductor.

    Raises:
        OptionError: an unknown or invalid option or pass.
        PipelineError: passes that cannot be ordered.
    """
    parsed = Options.parse(options, mode)
    registry = build_registry(parsed.plugins)
    pipeline = pipelines.build(
        registry, passes=parsed.passes, pipeline=parsed.pipeline, disable=parsed.disable
    )
    report = GraphReport(pipeline=pipelines.text_of(pipeline))
    for listener in _recording.get():
        listener.graphs.append(report)
        listener.faults.extend(f for f in registry.faults if f not in listener.faults)
    return _Compilation(parsed, registry, pipeline, report).run(module, inputs)


class _Compilation:
    """One graph on its way through."""

    def __init__(self, options: Options, registry: Registry, pipeline: list[Pass], report: GraphReport) -> None:
        self.options, self.registry, self.pipeline, self.report = options, registry, pipeline, report

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[stage] = self.report.seconds.get(stage, 0.0) + time.perf_counter() - start

    def run(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            with self._timed("capture"):
                captured = capture(module, inputs)
        except CaptureRefused as why:
            self.report.refused = str(why)
            return self._hand_over(module, inputs)
        self.report.training = captured.training
        weights = DerivedWeights(inputs)
        self._transform(captured, inputs, weights)
        lowered = self._lower(captured, inputs)
        compiled = self._hand_over(lowered, inputs)
        return _with_fresh_weights(compiled, lowered, weights)

    def _transform(self, captured: Captured, inputs: Sequence[Any], weights: DerivedWeights) -> None:
        module, hook = captured.module, self.registry.hook
        context = Context(
            target=target_of(_device(inputs)),
            training=captured.training,
            approve=lambda p, m, r: hook.effopt_approve_rewrite(pass_=p, match=m, replacement=r),
            weights=weights,
            plans=self.options.plans,
        )
        self.report.nodes_before = len(module.graph.nodes)
        hook.effopt_compile_start(module=module, options=self.options)
        for pass_ in self.pipeline:
            with self._timed(f"pass:{pass_.name}"):
                self.report.take(hook.effopt_run_pass(pass_=pass_, module=module, context=context))
        module.graph.eliminate_dead_code()
        self.report.nodes_after = len(module.graph.nodes)
        overloads = {op.overload: op.name for op in self.registry.ops.values()}
        self.report.ops = Counter(overloads[n.target] for n in module.graph.nodes if n.target in overloads)

    def _lower(self, captured: Captured, inputs: Sequence[Any]) -> GraphModule:
        with self._timed("lower"):
            chosen = lower(
                captured.module,
                self.registry.ops,
                self.registry.lowerings,
                target_of(_device(inputs)),
                captured.training,
                self.options.lowering,
            )
            self.report.lowerings = [
                LoweringRecord(c.node, c.op, c.choice.lowering.name, c.choice.refused) for c in chosen
            ]
            return restore(captured)

    def _hand_over(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.options.lowering == "eager":
            return module.forward
        settings = {**inductor.mode_options(self.options.mode), **self.options.inductor}
        with self._timed("backend"):
            identity = "|".join(p.fingerprint() for p in self.pipeline)
            return inductor.compile_graph(module, inputs, settings, identity)


def _with_fresh_weights(
    compiled: Callable[..., Any], module: GraphModule, weights: DerivedWeights
) -> Callable[..., Any]:
    if not weights.entries:
        return compiled

    def call(*inputs: Any) -> Any:
        for entry in weights.entries:
            entry.refresh(module, inputs)
        return compiled(*inputs)

    return call


def _device(inputs: Sequence[Any]) -> torch.device:
    for value in inputs:
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")
