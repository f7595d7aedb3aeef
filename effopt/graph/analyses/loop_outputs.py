"""What is read of a loop's states, and collected; and that nothing else reads them.

    y = stack(read(h_0), read(h_1), ..),   after a step's own update, or before it

Looks only. Exact: nothing is assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from effopt.graph.analyses.collected import Collected, collected, collectors, is_alive
from effopt.graph.analyses.lockstep import Along, Lockstep, Series, State, leaves
from effopt.graph.analyses.step_forms import Step
from effopt.graph.rewrite import Reject, require


@dataclass(frozen=True)
class Output:
    """The read-outs of all steps in one tensor."""

    collected: Collected
    """The tensor, and along which axis steps lie in it."""
    series: Series
    """The read-out of a step; `State()` in it is the state after that step."""
    reverse: bool
    """Whether the last step comes first in it."""
    is_before: bool
    """Whether steps read the state before their own update, and not after."""


@dataclass
class Reads:
    """The calls of all read-outs."""

    nodes: dict[Node, None]
    reading: set[Node]
    """Those that depend on a state."""


@dataclass(frozen=True)
class Ends:
    """Whether there is a step more than a chain has, and read-outs of it."""

    opens: bool
    """Ahead of the others: what the chain starts from is the state after it."""
    drops: bool
    """Behind them: it reads the last state, and what it would make of it is not wanted."""


def outputs_of(chain: Sequence[Step], may: Ends) -> tuple[tuple[Output, ...], Reads, Ends]:
    """What collects read-outs of every step, their calls, and whether there are steps besides.

    Args:
        chain: the steps.
        may: which further steps may be.

    Raises:
        Reject: where a read-out is not the same in all steps.
    """
    states = [step.node for step in chain]
    found = {
        last: (collected(last), value) for last, value in collectors(states[0], (chain[1].node,)).items()
    }
    is_longer = any(len(each.values) == len(chain) + 1 for each, _ in found.values())
    ends = Ends(is_longer and may.opens, is_longer and may.drops and not may.opens)
    start = chain[0].previous
    after: list[Any] = [start, *states] if ends.opens else states
    before: list[Any] = [start, *states] if ends.drops else [start, *states[:-1]]
    count = len(chain) + (ends.opens or ends.drops)
    outputs, reads = [], Reads({}, set())
    for last, (each, value) in found.items():
        told = f"{last.name} collects {len(each.values)} values, and the loop has {len(chain)} steps"
        more = ": start from zeros, in the form of the other steps" if len(each.values) > len(chain) else ""
        require(len(each.values) == count, told + more, last)
        try:
            outputs.append(_output(each, value, after, () if ends.opens else before, reads))
        except Reject as why:
            raise (Reject(told + more, last) if ends.drops else why) from None
    _require_independent(states, outputs)
    return tuple(outputs), reads, ends


def _output(
    found: Collected, value: Node, after: Sequence[Any], before: Sequence[Any], reads: Reads
) -> Output:
    """Reads what is collected from the first step to the last, or back."""
    values, near_front = found.values, found.values.index(value) < len(found.values) / 2
    why: Reject | None = None
    for reverse in (not near_front, near_front):
        lockstep = Lockstep(after, before)
        try:
            series = lockstep.series(values[::-1] if reverse else values)
        except Reject as reason:
            why = why or reason
            continue
        seen = {leaf.is_before for leaf in leaves(series) if isinstance(leaf, State)}
        if seen:
            words = "a step reads the state before its own update and after it in one read-out"
            require(len(seen) == 1, words, found.node)
            reads.nodes.update(lockstep.nodes)
            reads.reading.update(lockstep.reading)
            return Output(found, series, reverse, seen == {True})
    raise why or Reject("its read-outs are of no state", found.node)


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


def require_inside(chain: Sequence[Step], inside: set[Node], reads: Reads) -> None:
    """Only the next step and the read-outs read what a step computes; anyone reads the last state."""
    for user, step, after in _users_of_states(chain):
        told = f"the state of a step, {step.node.name}, is also read by {user.name}"
        require(user in _calls_of(after) or user in inside, told, user)
    own = {made: _calls_of(step) for step in chain for made in (step.product, *step.passed) if made}
    for made, calls in own.items():
        for user in made.users:
            told = f"the decayed state of a step, {made}, is also read by {user.name}"
            require(user in calls or user in inside or not is_alive(user), told, user)
    for node in reads.reading:
        for user in node.users:
            told = f"the read-out of a step, {node.name}, is also read by {user.name}"
            is_next = user in own.get(node, ())
            require(user in inside or is_next or not is_alive(user), told, user)


def _calls_of(step: Step) -> set[Node | None]:
    """The calls that make its state of the one before."""
    return {step.node, step.product, *step.passed}


def _users_of_states(chain: Sequence[Step]) -> Iterator[tuple[Node, Step, Step]]:
    """Each reader of a state but the last, the step that made it, and the next one."""
    for step, after in itertools.pairwise(chain):
        for user in step.node.users:
            if is_alive(user):
                yield user, step, after
