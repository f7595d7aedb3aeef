"""Which masked products of queries and keys weigh values, and are more than linear attention.

    (relu(query @ key^T) ** 2).tril() @ value;   (1 + s + s ** 2 / 2).tril() @ value, of such products s

Only what is square, masked by zeros, and pointwise between two products of matrices. Looks only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.between_matmuls import is_seen_through
from effopt.graph.analyses.masks.least_number import FILLS, WHERE
from effopt.graph.constants import constant_number
from effopt.graph.dataflow import calls_of
from effopt.graph.normalize import is_view
from effopt.graph.values import shape_of

_aten = torch.ops.aten
_MATMULS = (_aten.matmul.default, _aten.bmm.default)
_TRIANGLES = (_aten.tril.default, _aten.triu.default)
_KNOWN = (
    *(*_TRIANGLES, *FILLS, *WHERE),
    *(_aten.mul.Tensor, _aten.div.Tensor, _aten.clone.default, _aten._to_copy.default),
    *(_aten.dropout.default, _aten.type_as.default, _aten.repeat_interleave.self_int),
)
"""What a weight may go through and be linear in its scores."""
_FURTHEST = 32  # calls between the products; those of known models are at most ten


def bent_scores(graph: Graph) -> Iterator[tuple[Node, str]]:
    """The product with the values, and why it is no linear attention."""
    for node in calls_of(graph, _MATMULS):
        weights = node.args[0]
        path = _between(weights) if isinstance(weights, Node) else []
        bent = dict.fromkeys(str(x.target) for x in path if x.target not in _KNOWN and not is_view(x))
        if bent and any(map(_masks, path)):
            yield (
                node,
                f"masked products of queries and keys go through {', '.join(bent)} ahead of the values, and"
                " linear attention has factors and masks alone. Apply feature maps to queries and keys",
            )


def _between(weights: Node) -> list[Node]:
    """The calls from one square product of matrices to the weights; nothing if there is another way."""
    waiting, seen, products = [weights], set[Node](), set[Node]()
    while waiting and len(seen) < _FURTHEST:
        node = waiting.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in _MATMULS:
            products.add(node)
        elif is_seen_through(node):
            waiting.extend(node.all_input_nodes)
    sizes = shape_of(next(iter(products))) if len(products) == 1 else (0,)
    is_square = len(sizes) > 2 and statically_known_true(sizes[-1] == sizes[-2])
    reading = set(products) if is_square else set()
    for node in sorted(seen):
        if reading.intersection(node.all_input_nodes):
            reading.add(node)
    return sorted(reading - products) if weights in reading else []


def _masks(node: Node) -> bool:
    """Whether a call puts zeros in the place of scores."""
    operands: tuple[Any, ...] = node.args
    filled = node.target in FILLS and constant_number(operands[2]) == 0
    chosen = node.target in WHERE and any(constant_number(x) == 0 for x in operands[1:])
    return node.target in _TRIANGLES or filled or chosen
