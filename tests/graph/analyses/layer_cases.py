"""How tests look at the layers that are found: with what they read and gave when the graph was run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from effopt import pipeline as pipelines
from effopt.graph.analyses.layers import Stacks, stacks
from effopt.graph.capture import capture
from effopt.graph.restore import restore
from effopt.passes.base import Stage
from effopt.plugins.manager import build_registry
from effopt.testing.trial import Trial, run_passes


@dataclass
class Seen:
    """What was found in one graph, and what its layers read and gave when it was run."""

    found: Stacks
    values: dict[Node, Tensor] = field(default_factory=dict)

    @property
    def paths(self) -> list[list[str]]:
        return [[layer.path for layer in stack.layers] for stack in self.found]


class Watch(Interpreter):
    """Runs a graph and keeps the values at the borders of layers."""

    def __init__(self, module: GraphModule, seen: Seen) -> None:
        super().__init__(module)
        self.seen = seen
        self.borders = {n for s in seen.found for layer in s.layers for n in (layer.entry, layer.exit)}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.borders:
            self.seen.values[n] = value.detach().clone()
        return value


def recorder(graphs: list[Seen], runs: bool) -> Callable[..., Any]:
    """A backend that gathers the layers of every graph, and runs it once for their values if it `runs`."""
    passes = [p for p in pipelines.build(build_registry()) if p.stage < Stage.LAYERS]

    def backend(module: GraphModule, example: Any) -> Callable[..., Any]:
        trial = Trial(capture(module, example), tuple(example))
        run_passes(trial, passes)
        graphs.append(Seen(stacks(trial.module.graph)))
        if runs:
            runnable = restore(trial.captured, runs_eagerly=True)
            Watch(runnable, graphs[-1]).run(*map(real, example))
        return module.forward

    return backend


def real(value: Any) -> Any:
    """An input for a run of its own."""
    if isinstance(value, torch.SymInt):
        return int(value)
    return value.clone() if isinstance(value, Tensor) else value


def analysed(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> list[Seen]:
    """The graphs of a call, canonicalized and cleaned up, each with its layers."""
    graphs: list[Seen] = []
    torch.compile(model, backend=recorder(graphs, True), dynamic=dynamic)(*args, **kwargs)
    return graphs


def only(graphs: list[Seen]) -> Seen:
    """The graph, of several, that has layers; checks what the analysis promises of it."""
    (seen,) = [g for g in graphs if g.found.found]
    for stack in seen.found:
        assert len(stack.layers) > 1
        for before, after in zip(stack.layers, stack.layers[1:], strict=False):
            assert before.exit is after.entry
        for layer in stack.layers:
            entry, exit_ = layer.entry.meta["val"], layer.exit.meta["val"]
            assert (entry.dtype, entry.device) == (exit_.dtype, exit_.device)
            assert list(map(str, entry.shape)) == list(map(str, exit_.shape))
            assert layer.exit in layer.nodes
            assert list(layer.nodes) == sorted(layer.nodes)
    return seen


def watch_modules(model: nn.Module, paths: list[str]) -> tuple[dict[str, list[Tensor]], Callable[[], None]]:
    """What the modules read and give from now on, and how to stop."""
    noted: dict[str, list[Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            read = args[0] if args else kwargs["hidden_states"]
            given = output[0] if isinstance(output, tuple) else output
            noted[path] = [read.detach().clone(), given.detach().clone()]

        return hook

    hooks = [model.get_submodule(p).register_forward_hook(note(p), with_kwargs=True) for p in paths]
    return noted, lambda: [h.remove() for h in hooks].clear()


def assert_agrees_with_modules(
    model: nn.Module, inputs: dict[str, Any], expected: list[list[str]], **how: Any
) -> Seen:
    """Its stacks are these modules, and their borders carry what the modules read and give in eager."""
    noted, stop = watch_modules(model, [path for stack in expected for path in stack])
    model(**inputs)
    stop()
    seen = only(analysed(model, **inputs, **how))
    assert seen.paths == expected
    for layer in (layer for stack in seen.found for layer in stack.layers):
        read, given = noted[layer.path]
        # Some read [tokens, batch, features] and the graph no copy of that.
        torch.testing.assert_close(seen.values[layer.entry], read, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.values[layer.exit], given, rtol=1e-4, atol=1e-5)
    return seen
