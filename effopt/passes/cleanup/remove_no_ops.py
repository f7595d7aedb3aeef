"""Remove calls that give back what they got.

    x * 1, x / 1, x + 0, x - 0, cast to its own dtype, dropout that is off, clone, slice of all,
    expand or view to its own shape, transpose of a transpose, widening cast that is undone  =>  x

Exact, except that `x + 0` may keep the sign of a zero. A value that leaves the graph is left alone, for
it must not alias an input. Inference and training. Saves a read and a write of `x` each.
Source: Bacon, Graham & Sharp 1994, Compiler Transformations for High-Performance Computing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule
from torch.nn import functional as F

from effopt.graph.analyses.no_ops import stands_for
from effopt.graph.escape import escaping
from effopt.graph.rewrite import PassResult
from effopt.passes.base import Context, Example, GraphPass, Stage


@dataclass(frozen=True)
class RemoveNoOps(GraphPass):
    """A graph pass: a table of ops, and what leaves the graph matters, which no pattern can say."""

    name: ClassVar[str] = "remove-no-ops"
    stage: ClassVar[Stage] = Stage.CLEANUP

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Send the users of each no-op to what it stands for."""
        result, leaving = PassResult(), escaping(module.graph)
        for node in list(module.graph.nodes):
            source = stands_for(node)
            # One that leaves is no near-miss: the caller must not get `source` itself, whatever the model.
            if source is None or node in leaving:
                continue
            result.apply(self.name, "forward operand", node, f"is {source.name}")
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
        return result

    def samples(self) -> Iterable[Example]:
        x = torch.randn(3, 4)
        for no_op in (
            lambda x: x * 1, lambda x: x + 0, lambda x: x.clone(),
            lambda x: x.to(torch.float32, copy=True),
            lambda x: F.dropout(x, 0.5, training=False), lambda x: x.t().t(), lambda x: x.view(3, 4),
            lambda x: x.double().float(), lambda x: x.expand(3, 4), lambda x: x[:, :4] * 1.0,
        ):  # fmt: skip
            yield Example(lambda x, f=no_op: f(x.cos()).sin(), (x,))

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(3, 4)
        for change in (
            lambda x: x * 2, lambda x: x.half().float(), lambda x: F.dropout(x, 1.0), lambda x: x.t(),
            lambda x: x.view(4, 3), lambda x: x.expand(2, 3, 4), lambda x: x[:, :3], lambda x: 0 - x,
        ):  # fmt: skip
            yield Example(lambda x, f=change: f(x.cos()).sin(), (x,))
        yield Example(lambda x: x * 1, (x,))
