"""Blocks of keys that one call of a model chooses and the next ones read again: two graphs and the state.

    out = f(x)  =>  out, blocks = choose(x)   and   out = reuse(x, blocks)

Both are functional; what is remembered between calls stands beside them. It is of one model, told by its
parameters, for code that Dynamo compiled for one module serves others of its class.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols

from effopt.errors import EffoptError
from effopt.graph.capture import copy_graph, keep_identity
from effopt.graph.values import val

KEEP = "effopt_keep"
"""Key in the metadata of a node that chooses blocks: how many calls read one choice."""


def keepers(module: GraphModule) -> list[Node]:
    """The nodes whose value is kept between calls, in graph order."""
    return [node for node in module.graph.nodes if KEEP in node.meta]


@dataclass(eq=False)
class StepState:
    """Where one model stands between two choices."""

    first: weakref.ref[Tensor]
    """Its first parameter, by which its graphs find this."""
    parameters: tuple[weakref.ref[Tensor], ...] = ()
    """Those of the graph that chose."""
    chosen_by: object = None
    """The graph that chose last; None: the next call chooses."""
    sizes: tuple[Any, ...] = ()
    done: int = 0
    """Calls since, the one that chose included."""
    blocks: tuple[Tensor, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of what stands here: several threads may call one model."""

    def forget(self) -> None:
        """Have the next call choose."""
        with self.lock:
            self.chosen_by, self.blocks = None, ()


_STATES: weakref.WeakValueDictionary[int, StepState] = weakref.WeakValueDictionary()
"""Identity of a first parameter -> the steps of its model, as long as a graph of it holds them."""


def forget_blocks(model: nn.Module) -> None:
    """Have the next call of a model choose its blocks of keys, as before another prompt or another image.

    Args:
        model: the one that was compiled, a module around it, or a part of it: every graph that reads one of
            its parameters chooses anew. Without `reuse-blocks-between-steps` nothing is kept, and nothing
            happens.

    Raises:
        EffoptError: it has no parameter, by which a model is told from others.
    """
    identities = {id(parameter) for parameter in model.parameters()}
    if not identities:
        raise EffoptError(
            f"{type(model).__name__} has no parameter, by which kept blocks are found: pass the model that"
            " was compiled"
        )
    for steps in list(_STATES.values()):
        if any(id(was()) in identities for was in steps.parameters):
            steps.forget()


@dataclass(eq=False)
class KeptBlocks:
    """What one compiled graph keeps between calls."""

    every: int
    count: int
    """Selections of the graph."""
    parameters: tuple[int, ...]
    """Positions among the inputs."""
    tensors: tuple[int, ...]
    """Positions of the other tensors, whose sizes are looked at."""
    numbers: tuple[int, ...]
    """Positions of the numbers that sizes of blocks hang on."""
    held: list[StepState] = field(default_factory=list)
    """Of every model that the graph was called for and that is still there."""

    @staticmethod
    def of(module: GraphModule, inputs: Sequence[Any]) -> KeptBlocks | None:
        """What a lowered graph keeps; None if nothing."""
        nodes = keepers(module)
        if not nodes:
            return None
        symbols = {s for node in nodes for s in free_symbols(val(node))}
        is_parameter = [isinstance(value, nn.Parameter) for value in inputs]
        tensors, numbers = [], []
        for position, node in enumerate(module.graph.find_nodes(op="placeholder")):
            value = val(node)
            if isinstance(value, Tensor) and not is_parameter[position]:
                tensors.append(position)
            elif isinstance(value, torch.SymInt) and symbols & free_symbols(value):
                numbers.append(position)
        parameters = tuple(position for position, is_one in enumerate(is_parameter) if is_one)
        every = int(nodes[0].meta[KEEP])
        return KeptBlocks(every, len(nodes), parameters, tuple(tensors), tuple(numbers))

    def steps_of(self, inputs: Sequence[Any]) -> StepState:
        """Where the model of these inputs stands."""
        first = inputs[self.parameters[0]]
        steps = _STATES.get(id(first))
        if steps is None or steps.first() is not first:
            self.held = [s for s in self.held if s.first() is not None]
            steps = StepState(weakref.ref(first))
            _STATES[id(first)] = steps
        if steps not in self.held:
            self.held.append(steps)
        return steps

    def blocks_for(self, steps: StepState, inputs: Sequence[Any]) -> tuple[Tensor, ...] | None:
        """The blocks that a call with these inputs reads, and counts as one; None if it is to choose."""
        with steps.lock:
            may_reuse = (
                steps.chosen_by is self
                and steps.done < self.every
                and steps.sizes == self._sizes(inputs)
                and all(was() is inputs[i] for was, i in zip(steps.parameters, self.parameters, strict=True))
            )
            steps.done += may_reuse
            return steps.blocks if may_reuse else None

    def take(self, steps: StepState, inputs: Sequence[Any], blocks: Sequence[Tensor]) -> None:
        """Remember what a call chose."""
        # Copies: the memory of what compiled code returns may be its own, as under CUDA graphs.
        kept = tuple(each.clone() for each in blocks)
        with steps.lock:
            steps.blocks = kept
            steps.parameters = tuple(weakref.ref(inputs[i]) for i in self.parameters)
            steps.chosen_by, steps.sizes, steps.done = self, self._sizes(inputs), 1

    def _sizes(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        shapes = (tuple(inputs[i].shape) for i in self.tensors)
        return (*shapes, *(int(inputs[i]) for i in self.numbers))


def reusing(module: GraphModule) -> tuple[GraphModule, tuple[Any, ...]]:
    """A copy of a lowered graph that takes its blocks as last inputs, and their fake values."""
    places = [i for i, node in enumerate(module.graph.nodes) if KEEP in node.meta]
    made = GraphModule(module, copy_graph(module.graph))
    keep_identity(module, made)
    nodes = list(made.graph.nodes)
    fakes = []
    for number, node in enumerate(nodes[i] for i in places):
        last = list(made.graph.find_nodes(op="placeholder"))[-1]
        with made.graph.inserting_after(last):
            given = made.graph.placeholder(f"kept_blocks_{number}")
        given.meta["val"] = val(node)
        node.replace_all_uses_with(given)
        fakes.append(val(node))
    made.graph.eliminate_dead_code()
    made.recompile()
    return made, tuple(fakes)


def give_blocks(module: GraphModule) -> None:
    """Return the blocks of a lowered graph behind its results, in place."""
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *keepers(module)),)
    module.recompile()
