"""A graph for a test: captured once, run before and after passes, compared."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from effopt.graph.capture import Captured, capture
from effopt.graph.equivalence import difference, gradients_of, tensors_in
from effopt.graph.held_masks import HeldMasks
from effopt.graph.region import dropout_of, is_random
from effopt.graph.tolerances import GRADIENT_FACTOR, tolerance_of
from effopt.graph.weights import DerivedWeights
from effopt.passes.base import Context, Example, Pass
from effopt.passes.plans import Plans
from effopt.passes.region import RegionPass
from effopt.plugins.manager import build_registry
from effopt.plugins.observers import observers
from effopt.plugins.report import GraphReport
from effopt.target import target_of


@dataclass(frozen=True)
class Trial:
    """An example in normal form, with real inputs."""

    captured: Captured
    inputs: tuple[Any, ...]

    @property
    def module(self) -> GraphModule:
        """The graph; passes edit it."""
        return self.captured.module

    def copy(self) -> Trial:
        """The same with a graph of its own; values and metadata are shared."""
        return Trial(replace(self.captured, module=copy_of(self.module)), self.inputs)


def copy_of(module: GraphModule) -> GraphModule:
    """A module with a copy of the graph, and the same tensors and submodules."""
    graph = Graph()
    copies: dict[Any, Any] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    made = GraphModule(module, graph)
    made.meta.update(module.meta)
    return made


def capture_example(
    example: Example,
    *,
    training: bool = False,
    dtype: torch.dtype | None = None,
    dynamic: bool | None = None,
) -> Trial:
    """Bring an example to normal form.

    Args:
        example: a function or module, and its inputs.
        training: whether gradients are asked for, of all floating inputs and parameters.
        dtype: cast floating inputs, parameters and buffers to it.
        dynamic: as in `torch.compile`.

    Raises:
        CaptureRefused: the graph cannot be represented.
    """
    found: list[Captured] = []
    seen: list[tuple[Any, ...]] = []

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(capture(module, inputs))

        def call(*given: Any) -> Any:
            seen.append(tuple(_frozen(g) for g in given))
            return module(*given)

        return call

    run, inputs = _prepared(example, training, dtype)
    torch._dynamo.reset()
    with torch.set_grad_enabled(training), without_torch_messages():
        compiled: Callable[..., Any] = torch.compile(run, backend=backend, dynamic=dynamic, fullgraph=True)
        compiled(*inputs)
    torch._dynamo.reset()
    return Trial(found[0], seen[0])


@contextmanager
def without_torch_messages() -> Iterator[None]:
    """Keep torch from logging each graph that cannot run, and from warning of effopt's own ops."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            # Canonical ops stay whole in normal form: that is what is wanted.
            warnings.filterwarnings("ignore", "At pre-dispatch tracing", UserWarning)
            yield
    finally:
        logger.disabled = was


def _prepared(example: Example, training: bool, dtype: torch.dtype | None) -> tuple[Any, tuple[Any, ...]]:
    run = example.run
    if isinstance(run, torch.nn.Module):
        run = copy.deepcopy(run)
        if dtype is not None:
            run = run.to(dtype)
    return run, tuple(_cast(value, training, dtype) for value in example.inputs)


def _cast(value: Any, training: bool, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    # `.to` of another dtype keeps strides; a tensor of that dtype is not copied, and keeps them too.
    value = value.detach().to(dtype or value.dtype)
    return value.requires_grad_(training)


def _frozen(value: Any) -> Any:
    """The value as it was before the graph could write into it."""
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
        return int(value) if isinstance(value, torch.SymInt) else value
    kept = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if 0 in value.stride():
        return value
    kept.copy_(value.detach())
    return kept.requires_grad_(value.requires_grad)


def run_passes(trial: Trial, passes: Sequence[Pass], *, verify: str = "off") -> GraphReport:
    """Run passes over the trial's graph, as a compile call would, and report."""
    registry, report = build_registry(), GraphReport()
    watching = observers(registry, report, verify=verify, rtol=None, fuel=None, dump=None, runs_backend=False)
    for name, plugin in watching:
        registry.manager.register(plugin, name)
    device = next((i.device for i in trial.inputs if isinstance(i, Tensor)), torch.device("cpu"))
    context = Context(
        target=target_of(device),
        training=trial.captured.training,
        approve=lambda p, m, r: registry.hook.effopt_approve_rewrite(pass_=p, match=m, replacement=r),
        weights=DerivedWeights(trial.inputs),
        masks=HeldMasks(trial.inputs),
        plans=Plans(scores={p.name: _Counted() for p in passes if isinstance(p, RegionPass) and p.is_scored}),
    )
    for pass_ in passes:
        report.take(registry.hook.effopt_run_pass(pass_=pass_, module=trial.module, context=context))
    context.weights.materialize(trial.module)
    trial.module.recompile()
    report.faults.extend(registry.faults)
    return report


class _Counted(dict[str, float]):
    """Scores 0, 1, 2, ... in the order in which layers are asked for, in place of calibration's."""

    def __missing__(self, path: str) -> float:
        self[path] = float(len(self))
        return self[path]


def is_repeatable(trial: Trial) -> bool:
    """Whether two runs of the graph must agree: nothing in it draws random numbers."""
    return not any(is_random(n) or dropout_of(n) for n in trial.module.graph.nodes)


def disagreement(before: Trial, after: Trial, scale: float = 1.0) -> str:
    """How two graphs over the same inputs differ in values, and in training in gradients; empty if not.

    Args:
        before: the original.
        after: the same after passes.
        scale: multiplies floating inputs first.
    """
    inputs = [_scaled(i, scale) for i in before.inputs]
    dtypes = _dtypes(before.module)
    training = before.captured.training
    own, own_grads = _evaluate(before.module, inputs, training)
    got, got_grads = _evaluate(after.module, inputs, training)
    for index, (a, b) in enumerate(zip(got, own, strict=True)):
        tolerance = tolerance_of(b.dtype, *dtypes).rtol
        problem = difference(a, b, b, tolerance, tolerance)
        if problem:
            return f"result {index}: {problem}"
    for index, (a, b) in enumerate(zip(got_grads, own_grads, strict=True)):
        tolerance = GRADIENT_FACTOR * tolerance_of(*dtypes).rtol
        problem = difference(a, b, b, tolerance, tolerance)
        if problem:
            return f"gradient {index}: {problem}"
    return ""


def _dtypes(module: GraphModule) -> list[torch.dtype]:
    """All that a graph computes in: it may round an intermediate more than its inputs and outputs."""
    found = (t.dtype for node in module.graph.nodes for t in tensors_in(node.meta.get("val")))
    return [d for d in dict.fromkeys(found) if d.is_floating_point or d.is_complex]


def _scaled(value: Any, scale: float) -> Any:
    if scale == 1.0 or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return (value.detach() * scale).requires_grad_(value.requires_grad)


def _evaluate(
    module: GraphModule, inputs: Sequence[Any], training: bool
) -> tuple[list[Tensor], list[Tensor]]:
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
        torch.manual_seed(0)
        outputs = tensors_in(module(*inputs))
        leaves = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
        differentiable = [o for o in outputs if o.requires_grad]
        if not (training and leaves and differentiable):
            return [o.detach() for o in outputs], []
        return [o.detach() for o in outputs], gradients_of(differentiable, leaves)
