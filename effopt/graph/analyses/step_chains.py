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

from effopt.graph.analyses.lockstep import part_at
from effopt.graph.analyses.step_forms import TARGETS, Inner, Step, joined, steps_of
from effopt.graph.dataflow import calls_of
from effopt.graph.rewrite import Reject

_aten = torch.ops.aten
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
    """What is alike in all steps of a loop and cheap to see. Looks at a node once for each depth."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[tuple[Node, int], int] = {}

    def of_step(self, step: Step) -> Hashable:
        """Of both operands besides the state."""
        return self._near(step.decay, step.previous), self._near(step.added, step.previous)

    def _near(self, value: Any, state: Any) -> Hashable:
        if value is state:
            return "state"
        if isinstance(value, Inner):
            return value.target, *(self._near(operand, state) for operand in value.args)
        return self.of(value)

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
