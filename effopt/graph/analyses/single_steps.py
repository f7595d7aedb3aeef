"""Which sums are one step of a recurrence over a given state, as a model decodes token by token.

    state = decay * state + key^T value,   query @ state,   and the state is given back

One such sum is no loop. A weight that is changed by an outer product and read is a look-alike, and so are the
averages of an optimizer: only what is decayed, given, read by a contraction and given back is told. Looks
only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.step_chains import ByForm, Miss, is_outer
from effopt.graph.analyses.step_forms import Inner
from effopt.graph.values import is_floating, shape_of

_aten = torch.ops.aten
_CONTRACTIONS = (_aten.matmul.default, _aten.bmm.default, _aten.einsum.default, _aten.sum.dim_IntList)
_MATRIX_A_HEAD = 4  # dimensions of a state: batch, head, key and value
_FURTHEST = 8  # calls between a state and a product of it; those of known models are at most four
_MOST_ADDED = 32  # calls that make what is added of the state; those of known models are at most ten
_DELTA_RULE = "one step of a delta rule: what it adds depends on the given state, and no op computes that"
_REASON = (
    "one step of linear attention over a given state: recognition is of loops and of whole sequences, and a"
    " step stays as it is written. To have it as one call, write ops.linear_attention of effopt.graph"
)


def single_steps(steps: ByForm) -> Iterator[Miss]:
    """Each, once, and why it is left alone."""
    seen: set[Node] = set()
    for by_node in steps.values():
        for node, step in by_node.items():
            given = step.previous
            is_given = isinstance(given, Node) and given.op == "placeholder"
            fits = is_given and node not in seen and len(shape_of(node)) == _MATRIX_A_HEAD
            if fits and step.decay is not None and is_outer(step.added) and _is_read_and_returned(node):
                seen.add(node)
                yield Miss(_DELTA_RULE if _is_made_of(step.added, given) else _REASON, node, node)


def _is_read_and_returned(state: Node) -> bool:
    """Whether a product or a sum is taken of a state, near to it, and it is an output of the graph."""
    is_read = is_returned = False
    waiting, seen = [state], set[Node]()
    while waiting and len(seen) < _FURTHEST:
        node = waiting.pop(0)
        seen.add(node)
        for user in node.users:
            is_read |= user.target in _CONTRACTIONS
            is_returned |= (
                user.op == "output" and is_floating(node) and equal(shape_of(node), shape_of(state))
            )
            if user.target not in _CONTRACTIONS and user not in seen:
                waiting.append(user)
    return is_read and is_returned


def _is_made_of(value: Any, state: Node) -> bool:
    """Whether a value depends on a state."""
    waiting, seen = [value], set[Any]()
    while waiting and len(seen) < _MOST_ADDED:
        node = waiting.pop(0)
        if node is state:
            return True
        if isinstance(node, Inner):
            waiting.extend(node.args)
        elif isinstance(node, Node) and node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return False
