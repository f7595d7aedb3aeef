"""Which parts of a graph are a loop over time, unrolled, whose state is decayed and added to.

    h_t = a_t * h_(t-1) + u_t,   y_t = read(h_t, c_t),   y = stack(y_0, .., y_(T-1))

Dynamo unrolls a Python loop: step t reads `a`, `u` and `c` at position t. Proved of every step: that it is
the same as the others, that positions follow one another, that nothing but the next step and the read-out
reads a state, and that no operand depends on one. The last state may be read by anyone. Linear in nodes:
what can be a step is walked over once for each form, and compared by its neighbours' signatures, which are
computed once a node. Looks only. Exact: nothing is assumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from effopt.graph.analyses.collected import Collected, collected, collectors, is_alive
from effopt.graph.analyses.lockstep import Along, Lockstep, Series, State, leaves, part_at
from effopt.graph.constants import constant_number
from effopt.graph.matching import bound_arguments
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_SIGNATURE_DEPTH = 3  # calls of a step's operands that are compared to tell where a loop begins and ends


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


class Miss(Reject):
    """Why what looks like a loop is none."""

    def __init__(self, reason: str, node: Any, state: Node) -> None:
        super().__init__(reason, node or state)
        self.state = state
        """The state after one of its steps."""


@dataclass(frozen=True)
class Found:
    """The recurrences of a graph, and the reasons for what looks like one and is none."""

    recurrences: tuple[Recurrence, ...]
    misses: tuple[Miss, ...]


@dataclass(frozen=True)
class _Step:
    node: Node
    form: Hashable
    """Which operand is what."""
    previous: Any
    decay: Any
    """A node, or a number; None: nothing decays."""
    added: Any
    product: Node | None
    """The call of `decay * previous`, if it is one of its own."""


_Steps = dict[Hashable, dict[Node, _Step]]


def recurrences(graph: Graph) -> Found:
    """All loops of two steps or more, in graph order."""
    found, misses = [], []
    steps = _by_form(graph)
    told: set[Node] = set()
    for chain in _chains(steps):
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
    misses.extend(miss for miss in _nonlinear(steps) if miss.state not in told)
    return Found(tuple(sorted(found, key=lambda r: r.last)), tuple(misses))


def _steps_of(node: Node) -> Iterator[_Step]:
    """Every way in which a call can be one step."""
    if node.target is _aten.add.Tensor and bound_arguments(node)["alpha"] == 1:
        for i in (0, 1):
            kept, added = node.args[i], node.args[1 - i]
            if isinstance(kept, Node) and kept.target is _aten.mul.Tensor:
                for j in (0, 1):
                    decay, previous = kept.args[1 - j], kept.args[j]
                    is_number = type(decay) in (int, float) and isinstance(previous, Node)
                    if isinstance(decay, Node) or is_number:
                        yield _Step(node, ("mul", i, j), previous, decay, added, kept)
            yield _Step(node, ("add", i), kept, None, added, None)
    elif node.target is _aten.addcmul.default and bound_arguments(node)["value"] == 1:
        added, *factors = node.args[:3]
        for j in (0, 1):
            decay = factors[1 - j]
            if isinstance(decay, Node):
                yield _Step(node, ("addcmul", j), factors[j], decay, added, None)


def _by_form(graph: Graph) -> _Steps:
    """All that can be a step, by which operand is what; each in graph order."""
    found: _Steps = {}
    for node in graph.nodes:
        for step in _steps_of(node) if node.op == "call_function" else ():
            found.setdefault(step.form, {})[node] = step
    return found


def _chains(steps: _Steps) -> Iterator[list[_Step]]:
    """Steps of one form, each of which reads the state of the one before: two or more, that look alike."""
    length: dict[tuple[Hashable, Node], int] = {}
    for form, by_node in steps.items():
        for node, step in by_node.items():
            length[form, node] = 1 + length.get((form, step.previous), 0)
    taken: set[Node] = set()
    walked: set[tuple[Hashable, Node]] = set()
    signatures = _Signatures()
    for form, end in sorted(length, key=lambda key: -length[key]):
        if length[form, end] < 2:
            break
        chain: list[_Step] = []
        before: Any = end
        # From the furthest end down: what a longer chain went over is not gone over again.
        while before not in taken and (form, before) not in walked:
            found = steps[form].get(before)
            if found is None:
                break
            walked.add((form, before))
            chain.append(found)
            before = found.previous
        for alike in _runs(chain[::-1], signatures):
            taken.update(step.node for step in alike)
            yield alike


def _nonlinear(steps: _Steps) -> Iterator[Miss]:
    """Loops of three steps or more whose state goes through a call between steps."""
    for by_node in steps.values():
        length: dict[Node, int] = {}
        for node, step in by_node.items():
            before = step.previous
            inner = before.all_input_nodes if isinstance(before, Node) and before not in by_node else []
            if step.product is not None and inner and before.target is _aten.mul.Tensor:
                inner = [operand for operand in inner if operand in by_node]
            if len(inner) == 1 and inner[0] in by_node:
                length[node] = length.pop(inner[0], 0) + 1
        for node, links in length.items():
            step = by_node[node]
            if links >= 2 and (_reads_part(step.decay) or _reads_part(step.added)):
                target = step.previous.target
                twice = target is _aten.mul.Tensor and step.product is not None
                words = f"between steps its state goes through {target}"
                yield Miss(f"{words}: multiply the factors first" if twice else words, node, node)


def _reads_part(value: Any, depth: int = _SIGNATURE_DEPTH) -> bool:
    is_part = isinstance(value, Node) and part_at(value) is not None
    operands = value.all_input_nodes if isinstance(value, Node) and depth else []
    return is_part or any(_reads_part(operand, depth - 1) for operand in operands)


def _runs(chain: Sequence[_Step], signatures: _Signatures) -> Iterator[list[_Step]]:
    """Two steps or more, one after the other, whose operands are made alike.

    A scaling before a loop, or after it, has the form of a step.
    """
    runs = itertools.groupby(chain, key=lambda s: (signatures.of(s.decay), signatures.of(s.added)))
    yield from (steps for _, run in runs if len(steps := list(run)) >= 2)


class _Signatures:
    """What is alike in all steps of a loop and cheap to see. Looks at a node once for each depth."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[tuple[Node, int], int] = {}

    def of(self, value: Any, depth: int = _SIGNATURE_DEPTH) -> Hashable:
        """A leaf itself, and a number for calls that are alike."""
        if not isinstance(value, Node) or value.op != "call_function":
            return value if isinstance(value, Node) else str(type(value))
        if (value, depth) not in self._known:
            seen = self._look(value, depth)
            self._known[value, depth] = self._numbers.setdefault(seen, len(self._numbers))
        return self._known[value, depth]

    def _look(self, value: Node, depth: int) -> Hashable:
        part = part_at(value)
        if part is not None:
            return part.axis, part.keeps_axis, self.of(part.base, depth - 1) if depth else None
        operands = value.all_input_nodes if depth else []
        return value.target, *(self.of(operand, depth - 1) for operand in operands)


def _recurrence(chain: Sequence[_Step], lockstep: Lockstep) -> Recurrence:
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


def _start(first: _Step) -> Node | None:
    if constant_number(first.previous) == 0:
        return None
    require(isinstance(first.previous, Node), f"its state starts at {first.previous}", first.node)
    return first.previous


def _require_shape(chain: Sequence[_Step], start: Node | None) -> None:
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


def _outputs(chain: Sequence[_Step]) -> tuple[tuple[Output, ...], Lockstep]:
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


def _require_after_update(chain: Sequence[_Step], values: Sequence[Node], first: Node) -> None:
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


def _require_inside(chain: Sequence[_Step], inside: set[Node], reads: Lockstep) -> None:
    """Only the next step and the read-outs read what a step computes; anyone reads the last state."""
    following = [*chain[1:], None]
    for step, after in zip(chain, following, strict=True):
        if after is None:
            break
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
