"""Which node of one layer corresponds to which of an earlier one, where both compute something alike.

`counterparts` walks two values up to the layers' entries, operand by operand: equal calls with equal
constants correspond, inputs of the model (weights, caches) correspond if they have the same form, and a
node that both read corresponds to itself. It is exact: a pair that differs ends it, with that pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from effopt.graph.values import val


class Differ(Exception):  # noqa: N818 - an answer that travels by `raise`, not an error
    """Two values are not computed alike: `later` and `earlier` is the first pair that differs."""

    def __init__(self, later: Any, earlier: Any) -> None:
        super().__init__(f"{_told(later)} where the other has {_told(earlier)}")
        self.later, self.earlier = later, earlier


def counterparts(later: Node, earlier: Node, known: Mapping[Node, Node]) -> dict[Node, Node]:
    """Node under `later` -> its counterpart under `earlier`; those that both read are left out.

    Args:
        later: a value.
        earlier: a value, taken to correspond to it.
        known: pairs at which to stop: the entries of the layers, and what was found before.

    Raises:
        Differ: with the first pair that does not correspond.
    """
    found: dict[Node, Node] = {}
    waiting: list[tuple[Any, Any]] = [(later, earlier)]
    while waiting:
        a, b = waiting.pop()
        if a is b and a not in known and a not in found:
            continue
        if not isinstance(a, Node) or not isinstance(b, Node):
            if not _is_equal(a, b):
                raise Differ(a, b)
            continue
        before = known.get(a, found.get(a))
        if before is not None:
            if before is not b:
                raise Differ(a, b)
            continue
        found[a] = b
        waiting.extend(_operands(a, b))
    return found


def _operands(a: Node, b: Node) -> Iterator[tuple[Any, Any]]:
    if not has_same_form(a, b):
        raise Differ(a, b)
    if a.op != "call_function" and a.op == b.op:
        return
    if a.op != b.op or a.target is not b.target:
        raise Differ(a, b)
    ours, form = pytree.tree_flatten((a.args, dict(a.kwargs)))
    theirs, other_form = pytree.tree_flatten((b.args, dict(b.kwargs)))
    if form != other_form:
        raise Differ(a, b)
    yield from zip(ours, theirs, strict=True)


def has_same_form(a: Node, b: Node) -> bool:
    """Whether two values have the same shape, dtype and device.

    Sizes that are equal in this call and symbols are held equal by a guard: the lengths of two layers'
    caches are symbols of their own.
    """
    x, y = val(a), val(b)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return type(x) is type(y)
    return (
        (x.dtype, x.device, x.dim()) == (y.dtype, y.device, y.dim())
        and all(_is_size(m, n) for m, n in zip(x.shape, y.shape, strict=True))
    )  # fmt: skip


def _is_size(m: Any, n: Any) -> bool:
    if statically_known_true(m == n):
        return True
    hints = [size.node.hint if isinstance(size, torch.SymInt) else size for size in (m, n)]
    return None not in hints and hints[0] == hints[1] and bool(m == n)


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return bool(statically_known_true(a == b))
    return type(a) is type(b) and bool(a == b)


def _told(value: Any) -> str:
    return f"{value.name} ({value.target})" if isinstance(value, Node) else repr(value)
