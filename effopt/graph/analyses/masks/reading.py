"""Reads the graph of a mask as a function of the place in it.

    Reader().at(mask, (batch, head, query, key))

walks from the node to what it is computed from, through views, slices, index arithmetic, comparisons and
logic. What has no rule becomes an `Element` or a `Given`: a value that stands for itself, at the place
that it is read at. So a reading is never wrong, only less detailed. Looks only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.masks import choices, indexing, rules
from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.moves import Place, aligned, scalar, source_of
from effopt.graph.analyses.masks.rules import Unread, itself, number_of, pointwise
from effopt.graph.analyses.masks.sums import Axis
from effopt.graph.values import shape_of, val

_RULES = {**rules.RULES, **choices.RULES, **indexing.RULES}
_MOST_STEPS = 2000
"""Reads of one mask; those of `transformers` take below 100."""


class Reader:
    """Readings of one graph. Values: `Sum` of integers, a condition of booleans, else an atom or a float."""

    def __init__(self) -> None:
        self._known: dict[tuple[Node, Place], Any] = {}

    def at(self, node: Node, place: Place) -> Any:
        """What the element of `node` at `place` is."""
        key = (node, place)
        if key not in self._known:
            if len(self._known) >= _MOST_STEPS:
                return itself(node, place)
            self._known[key] = self._origin(node, place, self._read(node, place))
        return self._known[key]

    def _origin(self, node: Node, place: Place, value: Any) -> Any:
        """Conditions remember the outermost node that is just them, in a place that can be laid out again."""
        is_one = isinstance(value, (c.AtMost, c.Equal, c.Given, c.Not, c.Some)) and value != c.FALSE
        if is_one and (value.origin is None or covers(node, place)):
            return replace(value, origin=c.Origin(node, place))
        return value

    def _read(self, node: Node, place: Place) -> Any:
        moved = source_of(node, place)
        if moved is not None:
            return self.at(*moved)
        number = number_of(node)
        if number is not None:
            return number
        if node.op != "call_function":
            return itself(node, place)
        try:
            rule = _RULES.get(node.target)
            return (pointwise if rule is None else rule)(self, node, place)
        except Unread:
            return itself(node, place)

    def operand(self, node: Node, operand: Any, place: Place) -> Any:
        """The value of an operand of a pointwise node, broadcast."""
        if not isinstance(operand, Node) or not isinstance(val(operand), torch.Tensor):
            found = scalar(operand)
            return operand if found is None else found
        at = aligned(operand, shape_of(node), place)
        if at is None:
            raise Unread
        return self.at(operand, at)


def covers(node: Node, place: Place) -> bool:
    """Whether `node` holds each of the places once: along every dimension an axis, whole, or one index."""
    seen = set()
    for size, at in zip(shape_of(node), place, strict=True):
        axis = at.only
        if isinstance(axis, Axis):
            if axis.name in seen or not statically_known_true(size == axis.size):
                return False
            seen.add(axis.name)
        elif at.number is None:
            return False
    return True
