"""Remove what nothing reads.

    unused = f(x)  =>  (nothing)

Exact. Calls with an effect stay: assertions, random draws (removing one would shift every later draw),
and calls that write. Inference and training. Saves the removed calls.
Source: Aho, Lam, Sethi & Ullman 2006, Compilers, section 9.1.6.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from effopt.graph.rewrite import PassResult
from effopt.passes.base import Context, Example, GraphPass, Stage


@dataclass(frozen=True)
class EliminateDeadCode(GraphPass):
    """A graph pass, for no pattern can say that a value has no use."""

    name: ClassVar[str] = "eliminate-dead-code"
    stage: ClassVar[Stage] = Stage.CLEANUP

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Remove dead calls, users before their operands; one record tells how many."""
        result, removed = PassResult(), 0
        for node in reversed(module.graph.nodes):
            if node.users or node.op not in ("call_function", "get_attr") or node.is_impure():
                continue
            if not removed:
                result.apply(self.name, "nothing", node)
            removed += 1
            module.graph.erase_node(node)
        return result

    def samples(self) -> Iterable[Example]:
        yield Example(_with_unused, (torch.randn(3, 4),))

    def refusals(self) -> Iterable[Example]:
        yield Example(_with_unused_draw, (torch.randn(3, 4),))


def _with_unused(x: torch.Tensor) -> torch.Tensor:
    # Capture drops dead calls itself; the zeros die later, when the copy over all of them is spelled out.
    filled = torch.zeros_like(x)
    filled.copy_(x.cos())
    return filled + 1


def _with_unused_draw(x: torch.Tensor) -> torch.Tensor:
    torch.rand_like(x)
    return x + 1
