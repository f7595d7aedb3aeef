"""Which parts of a graph are a loop over time, unrolled, whose state is decayed and added to.

    h_t = a_t * h_(t-1) + u_t,   y_t = read(h_t, c_t),   y = stack(y_0, .., y_(T-1))

Dynamo unrolls a Python loop: step t reads `a`, `u` and `c` at position t. Proved of every step: that it is
the same as the others, that positions follow one another, that nothing but the next step and the read-out
reads a state, and that no operand depends on one. The last state may be read by anyone. What can be a step is
found by `step_chains.py`. Looks only. Exact: nothing is assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from effopt.graph.analyses.collected import Collected, collected, collectors, is_alive
from effopt.graph.analyses.lockstep import Along, Lockstep, Series, State, leaves
from effopt.graph.analyses.step_chains import Miss, Step, chains, nonlinear, steps_by_form
from effopt.graph.constants import constant_number
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import shape_of, val


@dataclass(frozen=True)
class Output:
    """The read-outs of all steps in one tensor."""

    collected: Collected
    """The tensor, and along which axis steps lie in it."""
    series: Series
    """The read-out of a step; `State()` in it is the state after that step."""
    reverse: bool
    """Whether the last step comes first in it."""


@dataclass(frozen=True)
class Recurrence:
    """`h = decay * h + added`, `steps` times from `start`, all of one shape and dtype."""

    start: Node | None
    """The state before the first step; None: zeros."""
    steps: int
    decay: Series | None
    """What a step multiplies the state by, broadcast to it; None: nothing."""
    added: Series
    outputs: tuple[Output, ...]
    last: Node
    """The state after the last step."""
    reads_last: bool
    """Whether something besides the outputs reads it."""
    nodes: tuple[Node, ...] = field(repr=False)
    """Every call that computes the above from `sources` and `start`, in graph order."""

    @property
    def sources(self) -> tuple[Node, ...]:
        """The tensors that steps read, parts of them or whole."""
        series = [self.added, *(output.series for output in self.outputs)]
        series += [] if self.decay is None else [self.decay]
        found = [leaf for each in series for leaf in leaves(each) if not isinstance(leaf, State)]
        return tuple(dict.fromkeys(leaf.base if isinstance(leaf, Along) else leaf.node for leaf in found))

    def down_to(self, operands: Set[Node]) -> tuple[Node, ...]:
        """The calls of the loop, and those that its sources are made by from `operands`; in graph order."""
        nodes, waiting = set(self.nodes), list(self.sources)
        while waiting:
            node = waiting.pop()
            if node not in nodes and node not in operands and node.op == "call_function":
                nodes.add(node)
                waiting.extend(node.all_input_nodes)
        return tuple(sorted(nodes))


@dataclass(frozen=True)
class Found:
    """The recurrences of a graph, and the reasons for what looks like one and is none."""

    recurrences: tuple[Recurrence, ...]
    misses: tuple[Miss, ...]


def recurrences(graph: Graph) -> Found:
    """All loops of two steps or more, in graph order."""
    found, misses = [], []
    steps = steps_by_form(graph)
    told: set[Node] = set()
    for chain in chains(steps):
        lockstep = Lockstep([step.previous for step in chain])
        try:
            found.append(_recurrence(chain, lockstep))
            told.update(step.node for step in chain)
        except Reject as why:
            # A sum of many things, such as a residual stream, is no loop that failed.
            if lockstep.has_parts and why.reason:
                misses.append(Miss(why.reason, why.node, chain[-1].node))
                told.update(step.node for step in chain)
        except Exception as error:  # noqa: BLE001 - a fault in reading one loop: told there, the others go on
            words = f"it cannot be read: {type(error).__name__}: {error}"
            misses.append(Miss(words, None, chain[-1].node))
    misses.extend(miss for miss in nonlinear(steps) if miss.state not in told)
    return Found(tuple(sorted(found, key=lambda r: r.last)), tuple(misses))


def _recurrence(chain: Sequence[Step], lockstep: Lockstep) -> Recurrence:
    """The recurrence that a chain of steps is. Raises `Reject`."""
    last = chain[-1].node
    added = lockstep.series([step.added for step in chain])
    decay = None if chain[0].decay is None else lockstep.series([step.decay for step in chain])
    operands = [leaf for series in (added, decay) if series is not None for leaf in leaves(series)]
    depends = any(isinstance(leaf, State) for leaf in operands)
    require(not depends, "what a step adds or multiplies by depends on the state", last)
    require(any(isinstance(leaf, Along) for leaf in operands), "", last)
    start = _start(chain[0])
    _require_shape(chain, start)
    outputs, reads = _outputs(chain)
    collecting = {node for output in outputs for node in output.collected.nodes}
    inside = collecting | reads.reading
    _require_inside(chain, inside, reads)
    products = {step.product for step in chain if step.product is not None}
    nodes = {step.node for step in chain} | products | {*lockstep.nodes, *reads.nodes} | collecting
    reads_last = any(is_alive(user) for user in last.users if user not in inside)
    return Recurrence(start, len(chain), decay, added, outputs, last, reads_last, tuple(sorted(nodes)))


def _start(first: Step) -> Node | None:
    if constant_number(first.previous) == 0:
        return None
    require(isinstance(first.previous, Node), f"its state starts at {first.previous}", first.node)
    return first.previous


def _require_shape(chain: Sequence[Step], start: Node | None) -> None:
    """Every state has one shape and dtype: nothing broadcasts a state, and nothing rounds it."""
    shape, dtype = shape_of(chain[0].node), val(chain[0].node).dtype
    require(dtype.is_floating_point, f"its state is {dtype}", chain[0].node)
    for step in chain:
        is_alike = shape_of(step.node) == shape and val(step.node).dtype == dtype
        require(is_alike, f"its state becomes {list(shape_of(step.node))} {val(step.node).dtype}", step.node)
    if start is not None:
        is_alike = shape_of(start) == shape and val(start).dtype == dtype
        told = f"{list(shape_of(start))} {val(start).dtype}"
        require(is_alike, f"its state starts as {told} and goes on as {list(shape)} {dtype}", chain[0].node)


def _outputs(chain: Sequence[Step]) -> tuple[tuple[Output, ...], Lockstep]:
    """What collects a read-out of every step; and the calls of those read-outs."""
    states = [step.node for step in chain]
    reads = Lockstep(states)
    outputs = []
    for last, first_value in collectors(states[0], (chain[1].node, chain[1].product)).items():
        found = collected(last)
        _require_after_update(chain, found.values, first_value)
        told = f"{last.name} collects {len(found.values)} values, and the loop has {len(states)} steps"
        require(len(found.values) == len(states), told, last)
        reverse = found.values[0] is not first_value
        series = reads.series(found.values[::-1] if reverse else found.values)
        outputs.append(Output(found, series, reverse))
    _require_independent(states, outputs)
    return tuple(outputs), reads


def _require_after_update(chain: Sequence[Step], values: Sequence[Node], first: Node) -> None:
    """A read-out takes what its step made of the state, not what its step found."""
    values = values if values[1:2] == (first,) else values[::-1]
    before = [*(step.previous for step in chain), chain[-1].node][: len(values)]
    if values[1:2] != (first,) or len(before) != len(values):
        return
    try:
        series = Lockstep(before).series(values)
    except Reject:
        return
    is_before = any(isinstance(leaf, State) for leaf in leaves(series))
    words = "each step reads the state before its own update, and not after"
    if len(values) > len(chain):
        words = (
            f"it collects {len(values)} values, and the loop has {len(chain)} steps: start from zeros, in "
            "the form of the other steps, and read no state before its own update"
        )
    require(not is_before, words, values[0])


def _require_independent(states: Sequence[Node], outputs: Sequence[Output]) -> None:
    """Nothing that a read-out takes besides the state is computed from one: the loop can then be one call.

    What a step reads is there before the first state is, by the order of the graph.
    """
    operands = [leaf for output in outputs for leaf in leaves(output.series) if not isinstance(leaf, State)]
    sources = {leaf.base if isinstance(leaf, Along) else leaf.node for leaf in operands}
    late = [source for source in sources if states[0] < source]
    depending, node = {states[0]}, states[0]
    while late and node is not max(late):
        node = node.next
        if any(operand in depending for operand in node.all_input_nodes):
            depending.add(node)
    for source in late:
        require(source not in depending, f"its read-out takes {source.name}, made of a state", source)


def _require_inside(chain: Sequence[Step], inside: set[Node], reads: Lockstep) -> None:
    """Only the next step and the read-outs read what a step computes; anyone reads the last state."""
    for step, after in itertools.pairwise(chain):
        allowed = {after.node, after.product}
        for user in step.node.users:
            told = f"the state of a step, {step.node.name}, is also read by {user.name}"
            require(user in allowed or user in inside or not is_alive(user), told, user)
    for step in chain:
        for user in step.product.users if step.product is not None else ():
            told = f"the decayed state of a step, {step.product}, is also read by {user.name}"
            require(user is step.node or not is_alive(user), told, user)
    for node in reads.reading:
        for user in node.users:
            told = f"the read-out of a step, {node.name}, is also read by {user.name}"
            require(user in inside or not is_alive(user), told, user)
