"""Which calls of a graph can be the steps of a loop over time: each reads the state of the one before.

    state_t = decay_t * state_(t-1) + added_t

A step has a form, which operand is what (`step_forms.py`); a chain has one form, and its operands look alike
in all steps. Linear in nodes: what can be a step is walked over once for each form, and compared by its
neighbours' signatures, which are computed once a node. Looks only, and proves nothing: `recurrences.py` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.einsum_letters import letters_of
from effopt.graph.analyses.lockstep import part_at
from effopt.graph.analyses.step_forms import TARGETS, Inner, Step, joined, steps_of
from effopt.graph.dataflow import calls_of
from effopt.graph.rewrite import Reject
from effopt.graph.values import is_floating, shape_of

_aten = torch.ops.aten
_MOST_BETWEEN = 16  # calls between two states; those of known models have at most five
_SIGNATURE_DEPTH = 3  # calls of a step's operands that are compared to tell where a loop begins and ends
ByForm = dict[Hashable, dict[Node, Step]]
"""Form -> the call of a step -> that step, each in graph order."""


class Miss(Reject):
    """Why what looks like a loop is none."""

    def __init__(self, reason: str, node: Any, state: Node) -> None:
        super().__init__(reason, node or state)
        self.state = state
        """The state after one of its steps."""


def steps_by_form(graph: Graph) -> ByForm:
    """All that can be a step, by which operand is what; each in graph order."""
    found: ByForm = {}
    for node in calls_of(graph, TARGETS):
        for step in steps_of(node):
            found.setdefault(step.form, {})[node] = step
    return {form: joined(by_node) for form, by_node in found.items()}


def chains(steps: ByForm) -> Iterator[list[Step]]:
    """Steps of one form, each of which reads the state of the one before: two or more, that look alike."""
    length: dict[tuple[Hashable, Node], int] = {}
    for form, by_node in steps.items():
        for node, step in by_node.items():
            length[form, node] = 1 + length.get((form, step.previous), 0)
    taken: set[Node] = set()
    walked: set[tuple[Hashable, Node]] = set()
    signatures = _Signatures()

    def ends_alike(form: Hashable, end: Node) -> bool:
        """Of two calls that read one state, the one that goes on as the others do."""
        step, before = steps[form][end], steps[form].get(steps[form][end].previous)
        return before is not None and signatures.of_step(step) == signatures.of_step(before)

    ends = [key for key in length if length[key] >= 2]
    for form, end in sorted(ends, key=lambda key: (-length[key], not ends_alike(*key))):
        chain: list[Step] = []
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


def nonlinear(steps: ByForm) -> Iterator[Miss]:
    """Loops of three steps or more whose state goes through a call between steps."""
    for by_node in steps.values():
        length: dict[Node, int] = {}
        through: dict[Node, list[Node]] = {}
        for node, step in by_node.items():
            inner, calls = _before(step, by_node)
            if inner is not None:
                length[node] = length.pop(inner, 0) + 1
                through[node] = calls
        for node, links in length.items():
            step = by_node[node]
            if links >= 2 and (_reads_part(step.decay) or _reads_part(step.added)):
                yield Miss(_words(step, through[node]), node, node)


def _words(step: Step, calls: Sequence[Node]) -> str:
    twice = step.product is not None and calls[0].target is _aten.mul.Tensor
    told = ", ".join(dict.fromkeys(str(call.target) for call in calls))
    if twice:
        return f"between steps its state goes through {told}: multiply the factors first"
    is_turned = len(calls[0].all_input_nodes) > 1 and is_outer(step.added)
    more = ": only a decay is known, and no matrix, as in a delta rule" if is_turned else ""
    return f"between steps its state goes through {told}{more}"


def _before(step: Step, by_node: dict[Node, Step]) -> tuple[Node | None, list[Node]]:
    """The one step whose state `step.previous` is made of, and the calls in between."""
    before = step.previous
    if not isinstance(before, Node) or before in by_node or before.op != "call_function":
        return None, []
    inner = before.all_input_nodes
    if step.product is not None and inner and before.target is _aten.mul.Tensor:
        inner = [operand for operand in inner if operand in by_node]
    if len(inner) == 1:
        return (inner[0] if inner[0] in by_node else None), [before]
    found: dict[Node, None] = {}
    calls: dict[Node, None] = {}
    # A state that a matrix turns, or that is read twice: looked for behind what is an outer product alone.
    waiting = [before] if is_outer(step.added) else []
    while waiting and len(calls) < _MOST_BETWEEN:
        node = waiting.pop(0)
        if node in by_node:
            found[node] = None
        elif node.op == "call_function" and node not in calls:
            calls[node] = None
            waiting.extend(node.all_input_nodes)
    reading = set(found)
    for call in sorted(calls):
        if reading.intersection(call.all_input_nodes):
            reading.add(call)
    return (next(iter(found)) if len(found) == 1 else None), [call for call in calls if call in reading]


def is_outer(value: Any, depth: int = _SIGNATURE_DEPTH) -> bool:
    """Whether a value is a product of a column and a row, however that is spelled, and of more factors."""
    target = value.target if isinstance(value, Inner | Node) else None
    given = value.args if target is not None else ()
    operands = [x for x in given if isinstance(x, Node) and is_floating(x)]
    if target is _aten.einsum.default:
        words = letters_of(str(value.args[0]))
        return words is not None and len(words[0]) == 2 and len(set(words[1])) > max(map(len, words[0]))
    if target in (_aten.outer.default, _aten.ger.default):
        return True
    if target is _aten.mul.Tensor and depth and any(is_outer(x, depth - 1) for x in operands):
        return True
    sizes = [shape_of(x) for x in operands[:2]]
    if len(sizes) != 2 or any(len(size) < 2 for size in sizes):
        return False
    if target in (_aten.matmul.default, _aten.bmm.default, _aten.mm.default):
        return statically_known_true(sizes[0][-1] == 1)
    crossed = any(
        statically_known_true(one[-1] == 1) and statically_known_true(other[-2] == 1)
        for one, other in (sizes, sizes[::-1])
    )
    return target is _aten.mul.Tensor and crossed


def _reads_part(value: Any, depth: int = _SIGNATURE_DEPTH) -> bool:
    if isinstance(value, Inner):
        return any(_reads_part(operand, depth) for operand in value.args)
    is_part = isinstance(value, Node) and part_at(value) is not None
    operands = value.all_input_nodes if isinstance(value, Node) and depth else []
    return is_part or any(_reads_part(operand, depth - 1) for operand in operands)


def _runs(chain: Sequence[Step], signatures: _Signatures) -> Iterator[list[Step]]:
    """Two steps or more, one after the other, whose operands are made alike.

    A scaling before a loop, or after it, has the form of a step.
    """
    runs = itertools.groupby(chain, key=signatures.of_step)
    yield from (steps for _, run in runs if len(steps := list(run)) >= 2)


class _Signatures:
    """What is alike in all steps of a loop and cheap to see. Looks once at a node, by depth and state."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[tuple[Node, Any, int], int] = {}

    def of_step(self, step: Step) -> Hashable:
        """Of both operands besides the state."""
        return self._near(step.decay, step.previous), self._near(step.added, step.previous)

    def _near(self, value: Any, state: Any) -> Hashable:
        if isinstance(value, Inner):
            return value.target, *(self._near(operand, state) for operand in value.args)
        return self._of(value, state)

    def _of(self, value: Any, state: Any, depth: int = _SIGNATURE_DEPTH) -> Hashable:
        """A leaf itself, and a number for calls that are alike."""
        if value is state:
            return "state"
        if not isinstance(value, Node) or value.op != "call_function":
            return value if isinstance(value, Node) else str(type(value))
        if (value, state, depth) not in self._known:
            seen = self._look(value, state, depth)
            self._known[value, state, depth] = self._numbers.setdefault(seen, len(self._numbers))
        return self._known[value, state, depth]

    def _look(self, value: Node, state: Any, depth: int) -> Hashable:
        part = part_at(value)
        if part is not None:
            return part.axis, part.keeps_axis, self._of(part.base, state, depth - 1) if depth else None
        operands = value.all_input_nodes if depth else []
        return value.target, *(self._of(operand, state, depth - 1) for operand in operands)
