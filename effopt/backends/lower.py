"""Chooses a lowering for every canonical op of a graph and puts it in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from effopt.backends.base import Choice, Lowering, choose
from effopt.backends.measured import Measurer
from effopt.graph.ops.base import Op
from effopt.graph.values import val
from effopt.graph.weights import DerivedWeights
from effopt.target import Target


@dataclass(frozen=True)
class Lowered:
    """What was chosen for one node."""

    node: str
    op: str
    choice: Choice


def lower(
    module: GraphModule,
    ops: Mapping[str, Op],
    lowerings: Mapping[str, Sequence[Lowering]],
    target: Target,
    training: bool,
    mode: str = "auto",
    weights: DerivedWeights | None = None,
    measurer: Measurer | None = None,
) -> list[Lowered]:
    """Replace the target of each canonical op by the `call` of its chosen lowering.

    Constants that a lowering wants in a layout of its own are derived in it; the op's own layout of them
    leaves the graph with its last reader.

    Args:
        module: graph of canonical ops; edited.
        ops: canonical ops by name.
        lowerings: candidates by op name, the reference last.
        target: device.
        training: whether a backward pass follows.
        mode: `auto` and `measured` choose by cost; `reference` and `eager` take every reference.
        weights: the derived constants of the graph; without them no operand is a constant.
        measurer: asked where predictions are near each other; without it they decide alone.
    """
    weights = weights or DerivedWeights()
    by_overload = {op.overload: op for op in ops.values()}
    done = []
    for node in module.graph.nodes:
        op = by_overload.get(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        bound = op.bind(node.args, node.kwargs)
        operands = map_aggregate(bound, val)
        candidates = lowerings[op.name][-1:] if mode in ("reference", "eager") else lowerings[op.name]
        asked = {name for candidate in candidates for name in candidate.prepack}
        constants = [name for name in bound if name in asked and weights.is_constant(bound[name])]
        measure = None if measurer is None else measurer.of(bound, val(node))
        choice = choose(candidates, target, operands, val(node), training, constants, measure)
        node.target = choice.lowering.call
        if choice.lowering.prepack:
            _prepack(module, node, bound, choice.lowering, weights)
        done.append(Lowered(node.name, op.name, choice))
    return done


def _prepack(
    module: GraphModule, node: Node, bound: Mapping[str, Any], lowering: Lowering, weights: DerivedWeights
) -> None:
    """Give the call of a lowering its operands by name, those of `prepack` in its layout."""
    laid_out = {}
    for name, lay_out in lowering.prepack.items():
        kind = f"{lay_out.__module__}.{lay_out.__qualname__}"
        laid_out[name] = weights.derive(module, kind, lay_out, bound[name])
    node.args, node.kwargs = (), {**bound, **laid_out}
    for name in laid_out:
        if bound[name].op == "get_attr" and not bound[name].users:
            module.graph.erase_node(bound[name])
