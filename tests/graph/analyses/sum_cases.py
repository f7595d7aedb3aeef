"""Places that are sums of indices, as numbers, and the values that a traced function has at its nodes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from effopt.graph.analyses.masks.sums import Axis, Sum


def traced(form: Callable[..., Tensor], *inputs: Tensor) -> tuple[Node, dict[Node, Tensor]]:
    """The node that is the result, and the values of all nodes."""
    module = make_fx(form, tracing_mode="fake", pre_dispatch=True)(*inputs)
    run = Interpreter(module, garbage_collect_values=False)
    run.run(*inputs)
    (output,) = module.graph.find_nodes(op="output")
    return output.args[0], run.env


def number(at: Sum, index: dict[str, int]) -> int:
    """What a sum of axes is at these indices."""
    total = at.constant
    for atom, by in at.terms:
        assert isinstance(atom, Axis)
        total += by * index[atom.name]
    return total
