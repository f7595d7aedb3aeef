"""Which parts of a graph are a loop over time, unrolled, whose state is decayed and added to.

    h_t = a_t * h_(t-1) + u_t,   y_t = read(h_t, c_t),   y = stack(y_0, .., y_(T-1))

Dynamo unrolls a Python loop: step t reads `a`, `u` and `c` at position t. Proved of every step: that it is
the same as the others, that positions follow one another, that nothing but the next step and the read-outs
reads a state, and that no operand depends on one. The first step may be `h = u`. The last state may be read
by anyone. What can be a step is found by `step_chains.py`, what is read of it by `loop_outputs.py`. Looks
only. Exact: nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.chunk_loops import in_chunks
from effopt.graph.analyses.collected import is_alive
from effopt.graph.analyses.lockstep import Along, Apply, Lockstep, Series, State, leaves, whole_of
from effopt.graph.analyses.loop_outputs import Ends, Output, outputs_of, require_inside
from effopt.graph.analyses.single_steps import single_steps
from effopt.graph.analyses.step_chains import Miss, chains, nonlinear, steps_by_form
from effopt.graph.analyses.step_forms import Step
from effopt.graph.constants import constant_number
from effopt.graph.dataflow import calls_down_to
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten


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
    """The state after the last step; after the one before it where the last one's is not wanted."""
    reads_last: bool
    """Whether something besides the outputs reads it."""
    opens: bool
    """Whether the first step is `h = added`: what it would be decayed by is not read."""
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
        own = set(self.nodes)
        return tuple(sorted(own | calls_down_to(self.sources, own | operands)))


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
        start, *states = (step.previous for step in chain)
        # The first step may find a copy of what others of its calls read.
        lockstep = Lockstep(
            [start, *states], [whole_of(start) if isinstance(start, Node) else start, *states]
        )
        try:
            found.append(_recurrence(chain, lockstep))
            # Its read-outs too: what decays a state and adds to it for a token alone looks like a step.
            told.update(found[-1].nodes)
        except Reject as why:
            # A sum of many things, such as a residual stream, is no loop that failed.
            reason = why.reason if lockstep.has_parts else in_chunks(chain)
            if reason:
                misses.append(Miss(reason, why.node, chain[-1].node))
                told.update(step.node for step in chain)
        except Exception as error:  # noqa: BLE001 - a fault in reading one loop: told there, the others go on
            words = f"it cannot be read: {type(error).__name__}: {error}"
            misses.append(Miss(words, None, chain[-1].node))
    misses.extend(m for m in (*nonlinear(steps), *single_steps(steps)) if m.state not in told)
    return Found(tuple(sorted(found, key=lambda r: r.last)), tuple(misses))


def _recurrence(chain: Sequence[Step], lockstep: Lockstep) -> Recurrence:
    """The recurrence that a chain of steps is. Raises `Reject`."""
    last = chain[-1].node
    try:
        added = lockstep.series([step.added for step in chain])
        decay = None if chain[0].decay is None else lockstep.series([step.decay for step in chain])
    except Reject as why:
        raise Reject(_carried(chain) or why.reason, why.node) from None
    operands = [leaf for series in (added, decay) if series is not None for leaf in leaves(series)]
    depends = any(isinstance(leaf, State) for leaf in operands)
    words = "what a step adds or multiplies by depends on the state, as in a delta rule: no op computes that"
    require(not depends, words, last)
    require(any(isinstance(leaf, Along) for leaf in operands), "", last)
    start = _start(chain[0])
    _require_shape(chain, start)
    first = None if start is None else _first_step(chain, start)
    goes_on = all(
        _has_place(leaf, leaf.first + leaf.stride * len(chain))
        for leaf in operands
        if isinstance(leaf, Along)
    )
    outputs, reads, ends = outputs_of(chain, Ends(first is not None, goes_on))
    collecting = {node for output in outputs for node in output.collected.nodes}
    inside = collecting | reads.reading
    require_inside(chain, inside, reads)
    products = {step.product for step in chain if step.product is not None}
    passed = {node for step in chain for node in step.passed}
    nodes = {step.node for step in chain} | products | passed | {*lockstep.nodes, *reads.nodes} | collecting
    reads_last = any(is_alive(user) for user in last.users if user not in inside)
    words = "its last step only reads the state, and the state is returned too: update it in each step"
    require(not (ends.drops and reads_last), words, last)
    steps = len(chain) + ends.drops
    found = Recurrence(
        start, steps, decay, added, outputs, last, reads_last, ends.opens, tuple(sorted(nodes))
    )
    return _opened(found, first) if first is not None and ends.opens else found


def _carried(chain: Sequence[Step]) -> str:
    """Why steps differ, if it is by what one of them hands to the next besides the state."""
    first, before, last = chain[0].node, chain[-2].node, chain[-1]
    waiting = [x for x in (last.added, last.decay) if isinstance(x, Node)]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in seen and node.op == "call_function" and first < node:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    handed = sorted(node for node in seen if node < before)
    is_state = any(step.node in seen for step in chain)
    words = "and a gate is to be known before the loop, as no running maximum is"
    return (
        f"a step takes {handed[-1].name}, which another step computes besides the state, {words}"
        if (handed and not is_state)
        else ""
    )


def _start(first: Step) -> Node | None:
    start = first.previous
    if constant_number(whole_of(start) if isinstance(start, Node) else start) == 0:
        return None
    require(isinstance(start, Node), f"its state starts at {start}", first.node)
    return start


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


def _first_step(chain: Sequence[Step], start: Node) -> tuple[Series, Lockstep] | None:
    """What all steps add, if `start` is what a step ahead of the others would make of zeros."""
    lockstep = Lockstep()
    try:
        series = lockstep.series([_added_to_zero(whole_of(start)), *(step.added for step in chain)])
    except Reject:
        return None
    return (series, lockstep) if any(isinstance(leaf, Along) for leaf in leaves(series)) else None


def _added_to_zero(node: Node) -> Node:
    """What a loop's first sum is of, where the state before it is a number, 0: strides aside, its value."""
    if node.target is not _aten.add.Tensor:
        return node
    zeros = [constant_number(operand) == 0 for operand in node.args[:2]]
    other = node.args[zeros.index(True) - 1] if zeros.count(True) == 1 else None
    is_same = isinstance(other, Node) and val(other).dtype == val(node).dtype
    return other if isinstance(other, Node) and is_same and shape_of(other) == shape_of(node) else node


def _opened(found: Recurrence, first: tuple[Series, Lockstep]) -> Recurrence:
    """The recurrence with the step ahead of the others: from zeros, which no decay changes."""
    added, lockstep = first
    decay = None if found.decay is None else _one_back(found.decay, found.last)
    nodes = tuple(sorted({*found.nodes, *lockstep.nodes}))
    return replace(found, start=None, steps=found.steps + 1, added=added, decay=decay, nodes=nodes)


def _one_back(series: Any, where: Node) -> Any:
    """The series of all steps, of that of all but the first."""
    if isinstance(series, Along):
        place = series.first - series.stride
        words = f"its first step is not decayed, and {series.base.name} has places for the others alone"
        require(_has_place(series, place), f"{words}: start from zeros", where)
        return replace(series, first=place)
    if isinstance(series, tuple):
        return tuple(_one_back(item, where) for item in series)
    if not isinstance(series, Apply):
        return series
    kwargs = {name: _one_back(value, where) for name, value in series.kwargs.items()}
    return replace(series, args=_one_back(series.args, where), kwargs=kwargs)


def _has_place(parts: Along, place: int) -> bool:
    size = val(parts.base).shape[parts.axis]
    return place >= 0 and statically_known_true(place < size)
