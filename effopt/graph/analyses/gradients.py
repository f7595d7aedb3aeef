"""Which values of a graph carry a gradient, for given inputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Interpreter, Node

from effopt.graph.values import fake_mode_of, val


def differentiable(module: GraphModule, inputs: Sequence[Any]) -> frozenset[Node]:
    """Nodes whose value requires a gradient when `inputs` are the graph's inputs.

    Exact: the graph is run once on fake tensors that require gradients where the inputs do, because
    which ops stop a gradient (`zeros_like`, `argmax`, comparisons) is known to autograd alone.
    Writes into inputs are not run.
    """
    fakes = [val(node) for node in module.graph.find_nodes(op="placeholder")]
    mode = fake_mode_of(fakes)
    with torch.enable_grad(), mode or nullcontext(), enable_python_dispatcher():
        runner = _Recorder(module)
        runner.run(*[_leaf(fake, real) for fake, real in zip(fakes, inputs, strict=True)])
    return frozenset(runner.found)


def reached_by_loss(graph: Graph, carrying: frozenset[Node]) -> frozenset[Node]:
    """Nodes of `carrying` from which a gradient-carrying output is reached through `carrying`.

    The others require a gradient and get none: what follows them was detached.
    """
    (output,) = graph.find_nodes(op="output")
    reached = {n for n in output.all_input_nodes if n in carrying}
    for node in reversed(graph.nodes):
        # A call of several results is no tensor; it carries what its results carry.
        if node in reached or any(user in reached for user in node.users):
            several = isinstance(val(node), (tuple, list))
            if node in carrying or several:
                reached.add(node)
    return frozenset(reached & carrying)


def requires_grad_leaf(fake: torch.Tensor, wanted: bool) -> torch.Tensor:
    """A detached copy of a fake tensor that requires a gradient if `wanted`."""
    return fake.detach().requires_grad_(wanted)


def _leaf(fake: Any, real: Any) -> Any:
    if not isinstance(fake, torch.Tensor):
        return fake
    return requires_grad_leaf(fake, isinstance(real, torch.Tensor) and real.requires_grad)


class _Recorder(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable:
            return self.env[n.args[0]]  # type: ignore[index]
        if n.op == "get_attr":
            return val(n) if "val" in n.meta else super().run_node(n)
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.requires_grad:
            self.found.add(n)
        return result
