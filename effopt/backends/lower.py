"""Chooses a lowering for every canonical op of a graph and puts it in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from effopt.backends.base import Choice, Lowering, choose
from effopt.graph.ops.base import Op
from effopt.graph.values import val
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
) -> list[Lowered]:
    """Replace the target of each canonical op by the `call` of its chosen lowering.

    Args:
        module: graph of canonical ops; edited.
        ops: canonical ops by name.
        lowerings: candidates by op name, the reference last.
        target: device.
        training: whether a backward pass follows.
        mode: `auto` chooses by cost; `reference` and `eager` take every reference.
    """
    by_overload = {op.overload: op for op in ops.values()}
    done = []
    for node in module.graph.nodes:
        op = by_overload.get(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        operands = map_aggregate(op.bind(node.args, node.kwargs), val)
        candidates = lowerings[op.name] if mode == "auto" else lowerings[op.name][-1:]
        choice = choose(candidates, target, operands, val(node), training)
        node.target = choice.lowering.call
        done.append(Lowered(node.name, op.name, choice))
    return done
