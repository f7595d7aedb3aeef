"""Choose blocks of keys at one call of a model in so many, and read the same blocks at the others.

    call 0:  block_sparse_attention(q, k, v, select(q, k))  =>  the same, and its blocks are kept
    calls 1 to every - 1:                                   =>  block_sparse_attention(q, k, v, kept blocks)

Lossy: `every` is the knob; 1 cannot be asked for, it is the selector alone. Composes with whatever selects
blocks; made for models that are called again and again on almost the same input, such as the steps of a
diffusion sampler. A step is a call of the compiled model. Inference only; needs no training and no data.
Saves the arithmetic of choosing at all other calls, costs a second compiled graph and the memory of the
blocks. `effopt.forget_blocks(model)`, another shape, dtype or device, or other parameters begin anew.

Source: Xia et al. 2025, arXiv:2502.21079 (blocks searched at some denoising steps and cached between them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from effopt.graph import ops
from effopt.graph.kept_blocks import KEEP
from effopt.graph.rewrite import PassResult, Reject, require
from effopt.graph.values import val
from effopt.passes.base import Context, Example, GraphPass, Stage, option
from effopt.passes.block_selector import SELECTED


@dataclass(frozen=True)
class ReuseBlocksBetweenSteps(GraphPass):
    """Marks what chooses blocks. A pass over the graph, for all selections of a graph are kept alike."""

    name: ClassVar[str] = "reuse-blocks-between-steps"
    stage: ClassVar[Stage] = Stage.ATTENTION
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = (SELECTED,)

    every: int = option(4, "calls that read one choice of blocks, the one that chooses included", min=2)

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Mark every selection that may be kept."""
        result = PassResult()
        for node in module.graph.find_nodes(op="call_function", target=ops.block_sparse_attention.overload):
            bound = ops.block_sparse_attention.bind(node.args, node.kwargs)
            blocks = bound["blocks"]
            if KEEP in blocks.meta:
                continue
            try:
                self._legal(node, bound, context)
            except Reject as why:
                result.reject(self.name, node, why.reason)
                continue
            blocks.meta[KEEP] = self.every
            result.apply(self.name, "block_sparse_attention", node, f"its blocks serve {self.every} calls")
        return result

    def _legal(self, node: Node, bound: dict[str, Any], context: Context) -> None:
        blocks = bound["blocks"]
        require(not context.training, "training: weights change between calls, and blocks with them", node)
        chosen = blocks.op == "call_function"
        require(chosen, "its blocks are given from outside: the graph does not choose them", node)
        # Blocks kept may all be hidden by the mask of a later call, and a row would then see no key.
        hidden = "a mask over keys may be another one at the next call: pad to no mask, or choose each time"
        readers = [user for user in blocks.users if user.target is ops.block_sparse_attention.overload]
        masks = (ops.block_sparse_attention.bind(user.args, user.kwargs)["key_mask"] for user in readers)
        require(all(mask is None for mask in masks), hidden, node)
        unsized = "how many blocks there are is known at run time only"
        require(not free_unbacked_symbols(val(blocks)), unsized, node)
        owned = "no parameter among the inputs of the graph tells whose blocks these are: compile the module"
        inputs = node.graph.find_nodes(op="placeholder")
        require(any(context.weights.is_weight(each) for each in inputs), owned, node)

    def samples(self) -> Iterable[Example]:
        yield Example(_Layer(), (torch.randn(1, 2, 64, 8),), training=False)

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(1, 2, 64, 8)
        yield Example(_Layer(), (x,), "training: weights change", training=True)
        yield Example(lambda x: _attend(x, _choose(x)), (x,), "no parameter among the inputs")
        given = torch.ones(1, 2, 4, 4, dtype=torch.bool)
        yield Example(_attend, (x, given), "its blocks are given from outside")
        masked = lambda x, seen: _attend(x, _choose(x), key_mask=seen)  # noqa: E731
        yield Example(masked, (x, torch.arange(64)[None] > 3), "a mask over keys may be another one")


class _Layer(nn.Module):
    """Attention over chosen blocks, of projected inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x)
        return _attend(q, _choose(q))


def _choose(q: Tensor) -> Tensor:
    chosen: Tensor = ops.region_blocks.overload(q, q, block=16, count=2)
    return chosen


def _attend(q: Tensor, blocks: Tensor, **given: Any) -> Tensor:
    out: Tensor = ops.block_sparse_attention.overload(q, q, q, blocks, block=16, scale=0.3, **given)
    return out
