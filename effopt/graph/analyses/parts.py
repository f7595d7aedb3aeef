"""Which part of another tensor's last dimension a node is, however it was taken out.

Reads `slice`, `split` and `split_with_sizes` with `getitem`, and, for every other position, `select`
or `unbind` of a view as pairs. One step back only, static sizes only: exact, or None.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.ops.base import bind_schema
from effopt.graph.values import shape_of

_aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """`base[..., start:stop:step]`, with `0 <= start <= stop <= base.shape[-1]`."""

    base: Node
    start: int
    stop: int
    step: int

    def __str__(self) -> str:
        """As Python would write it, the last dimension alone."""
        return f"{self.base.name}[{self.start}:{self.stop}{f':{self.step}' if self.step != 1 else ''}]"


def part_of(node: Node) -> Part | None:
    """The part of its source's last dimension that `node` is; None if none, or if sizes are symbolic."""
    if node.op != "call_function":
        return None
    if node.target is _aten.slice.Tensor:
        return _sliced(node)
    if node.target is _aten.select.int:
        bound = bind_schema(_aten.select.int, node.args, node.kwargs)
        return _of_pairs(bound["self"], bound["dim"], bound["index"])
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return _item(node.args[0], node.args[1])
    return None


def _is_last(dim: Any, base: Node) -> bool:
    rank = len(shape_of(base))
    return type(dim) is int and rank > 0 and dim % rank == rank - 1


def _sliced(node: Node) -> Part | None:
    bound = bind_schema(_aten.slice.Tensor, node.args, node.kwargs)
    base, start, stop, step = bound["self"], bound["start"] or 0, bound["end"], bound["step"]
    size: Any = shape_of(base)[-1] if shape_of(base) else None
    stop = size if stop is None else stop
    if not _is_last(bound["dim"], base) or any(type(n) is not int for n in (size, start, stop, step)):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return Part(base, start, max(start, stop), step)


def _item(source: Node, index: Any) -> Part | None:
    if source.target is _aten.unbind.int:
        bound = bind_schema(_aten.unbind.int, source.args, source.kwargs)
        return _of_pairs(bound["self"], bound["dim"], index)
    if source.target not in (_aten.split.Tensor, _aten.split.sizes, _aten.split_with_sizes.default):
        return None
    base, sizes, dim = bind_schema(source.target, source.args, source.kwargs).values()
    if not _is_last(dim, base) or type(shape_of(base)[-1]) is not int:
        return None
    size = shape_of(base)[-1]
    if isinstance(sizes, int):
        return Part(base, sizes * index, min(sizes * (index + 1), size), 1)
    if not all(type(s) is int for s in sizes):
        return None
    start = sum(sizes[:index])
    return Part(base, start, start + sizes[index], 1)


def _of_pairs(viewed: Node, dim: Any, index: Any) -> Part | None:
    """Position `index` of each pair, where `viewed` is `base` with its last dimension viewed as pairs."""
    if viewed.target not in (_aten.view.default, _aten.reshape.default) or not _is_last(dim, viewed):
        return None
    base: Any = viewed.args[0]
    was, now = shape_of(base), shape_of(viewed)
    is_paired = len(now) == len(was) + 1 and now[-1] == 2 and type(was[-1]) is int and index in (0, 1)
    is_paired = is_paired and all(
        statically_known_true(a == b) for a, b in zip(was[:-1], now[:-2], strict=True)
    )
    return Part(base, index, was[-1], 2) if is_paired else None
