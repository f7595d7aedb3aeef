"""The Dynamo backend: a pipeline for each compile call, and the reports of what was compiled."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import GraphModule

from effopt import pipeline as pipelines
from effopt.compilation import Compilation
from effopt.errors import OptionError
from effopt.graph import release
from effopt.graph.held_masks import STANDS_ON
from effopt.options import Options
from effopt.passes.base import Pass
from effopt.passes.plan import Plan
from effopt.passes.plans import plans_from
from effopt.plugins.manager import Registry, build_registry
from effopt.plugins.report import GraphReport, Report

_recording: ContextVar[tuple[Report, ...]] = ContextVar("effopt_recording", default=())

_files: dict[str, Report] = {}
"""Path given as option `report` -> what was compiled for it in this process: a model has several graphs."""


@contextmanager
def record() -> Iterator[Report]:
    """Gather the report of everything compiled inside."""
    report = Report()
    token = _recording.set((*_recording.get(), report))
    try:
        yield report
    finally:
        _recording.reset(token)


def check_options(options: Mapping[str, Any] | None, mode: str | None = None) -> None:
    """Raise what a compile call with these options would: OptionError or PipelineError."""
    parsed = Options.parse(options, mode)
    _pipeline(parsed, build_registry(parsed.plugins))


def _pipeline(parsed: Options, registry: Registry) -> tuple[list[Pass], tuple[Plan, ...]]:
    plans = plans_from(parsed.plans)
    built = pipelines.build(
        registry, passes=parsed.passes, pipeline=parsed.pipeline, disable=parsed.disable, plans=plans
    )
    if parsed.release_weights and not any(release.REPLACES in p.provides for p in built):
        raise OptionError(
            "option 'release_weights' frees parameters that a pass replaced, and no pass of this pipeline"
            ' replaces any; add one: {"passes": "quantize-weights"}'
        )
    return built, plans


def explain(
    model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile `model`, call it once on these inputs, and report what was done.

    The call runs under the gradient and autocast modes around it: under `torch.no_grad()` it explains
    inference, else training if a parameter asks for a gradient. It is compiled afresh each time.

    Args:
        model: a module, or a function of tensors.
        inputs: positional inputs of the call.
        options: as for `torch.compile`.
        kwargs: keyword inputs of the call.

    Raises:
        OptionError, PipelineError: before anything is compiled.
    """
    if not callable(model):
        raise OptionError(
            f"explain takes a module or a function of tensors, got {model!r} ({type(model).__name__})"
        )
    check_options(options)

    # A backend of its own: Dynamo would answer a second request with the first one's code, and no report.
    def afresh(module: GraphModule, example: Sequence[Any], **given: Any) -> Callable[..., Any]:
        return effopt(module, example, **given)

    with record() as report, torch._dynamo.config.patch(recompile_limit=sys.maxsize):
        torch.compile(model, backend=afresh, options=dict(options or {}))(*inputs, **kwargs)
    return report


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
    with _one_at_a_time():
        return _compile(module, inputs, options, mode)


def _compile(
    module: GraphModule, inputs: Sequence[Any], options: Mapping[str, Any] | None, mode: str | None
) -> Callable[..., Any]:
    parsed = Options.parse(options, mode)
    registry = build_registry(parsed.plugins)
    pipeline, plans = _pipeline(parsed, registry)
    report = GraphReport(pipeline=pipelines.text_of(pipeline))
    listeners = [*_recording.get(), *([_files.setdefault(parsed.report, Report())] if parsed.report else [])]
    for listener in listeners:
        listener.graphs.append(report)
        listener.faults.extend(f for f in registry.faults if f not in listener.faults)
    try:
        standing = [p.name for p in pipeline if STANDS_ON in p.provides]
        again = {**(options or {}), "disable": [*parsed.disable, *standing]}
        backend = functools.partial(effopt, options=again, mode=mode)
        otherwise = lambda: torch.compile(module, backend=backend)  # noqa: E731
        compilation = Compilation(parsed, registry, pipeline, plans, report, otherwise, bool(listeners))
        with _oldest_uncollected():
            compiled = compilation.run(module, inputs)
        registry.hook.effopt_compile_end(report=report)
    finally:
        for listener in listeners:
            faults = (*registry.faults, *report.faults)
            listener.faults.extend(f for f in faults if f not in listener.faults)
    if parsed.report:
        _files[parsed.report].write(parsed.report)
    return compiled


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Compile one graph at a time, as Dynamo does, which holds the same lock around a backend that it calls.

    What a compilation sets is of the process in part: the collector's threshold, a flag of the operator for
    subgraphs, calls that are set aside while a graph is captured.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        yield


@contextmanager
def _oldest_uncollected() -> Iterator[None]:
    """Keep Python's collector from walking all that a process has imported, as graphs make it do.

    What is new is collected as ever. 0.4 s of 12.5 s for Llama with 12 layers in training.
    """
    youngest, middle, oldest = gc.get_threshold()
    gc.set_threshold(youngest, middle, 1 << 30)
    try:
        yield
    finally:
        gc.set_threshold(youngest, middle, oldest)
