"""Which loops go over chunks of tokens, and not over tokens.

    state = decay * state + key[a:b]^T @ value[a:b],   the next step from b on

Nothing reads such a loop as one; it is told from other sums of products by what its steps take. Looks only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.step_forms import Inner, Step
from effopt.graph.matching import bound_arguments
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_PRODUCTS = (
    *(_aten.matmul.default, _aten.bmm.default, _aten.mm.default, _aten.einsum.default),
    *(_aten.baddbmm.default, _aten.addmm.default),
)
_SPLITS = (_aten.split.Tensor, _aten.chunk.default, _aten.tensor_split.sections)
_FURTHEST = 32  # calls between what a step adds and what it takes; those of known models are at most ten
Run = tuple[Node, int, int, int]
"""A tensor, an axis, the first place that is taken, and how many."""


def in_chunks(chain: Sequence[Step]) -> str:
    """Why a loop whose steps add products of chunks of tokens is left alone; nothing for any other."""
    first = chain[0].added
    if not isinstance(first, Inner | Node) or first.target not in _PRODUCTS:
        return ""
    taken = [set(_runs(step.added)) for step in chain]
    for base, axis, start, size in sorted(taken[0], key=lambda run: (run[0], *run[1:])):
        if all((base, axis, start + i * size, size) in runs for i, runs in enumerate(taken)):
            return (
                f"its steps take {size} places of {base.name} each: a loop over chunks is not read as one."
                " Write a loop over single tokens, or the weights of all tokens with their decay as a mask"
            )
    return ""


def _runs(value: Any) -> Iterator[Run]:
    """The places, more than one, that a value takes of tensors."""
    waiting, seen = [value], set[Any]()
    while waiting and len(seen) < _FURTHEST:
        node = waiting.pop(0)
        if isinstance(node, Inner):
            waiting.extend(x for x in node.args if isinstance(x, Node | Inner))
        elif node not in seen and node.op == "call_function":
            seen.add(node)
            run = _run_of(node)
            if run is not None:
                yield run
            waiting.extend(node.all_input_nodes)


def _run_of(node: Node) -> Run | None:
    if node.target is _aten.slice.Tensor:
        base, axis, start, *_, step = bound_arguments(node).values()
        start = start or 0
    elif node.target is operator.getitem and isinstance(node.args[0], Node):
        if node.args[0].target not in _SPLITS:
            return None
        base, _, axis = bound_arguments(node.args[0]).values()
        start, step = node.args[1] * shape_of(node)[axis], 1
    else:
        return None
    axis = axis % val(base).dim()
    size, whole = shape_of(node)[axis], shape_of(base)[axis]
    is_known = type(start) is int and type(size) is int and start >= 0 and step == 1
    return (
        (base, axis, start, size)
        if is_known and size > 1 and not statically_known_true(size == whole)
        else None
    )
