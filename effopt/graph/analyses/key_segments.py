"""Keys and values that are put together from parts, and which of the parts are the same for the whole batch.

    k = cat([prefix.expand(b, ...), own], dim=-2)   =>   prefix: one for all batch entries; own: one for each

A part is the same for the whole batch if it is proved to be: it is expanded, or repeated, from one batch
entry, or it is an input whose batch dimension has stride 0, which Dynamo guards. Looks only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.no_ops import COPIES
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_COPIES = (*COPIES, _aten.detach.default)
"""Of inference, for which keys are read in parts: no gradient is asked for behind a `detach`."""


@dataclass(frozen=True)
class Shared:
    """What one batch entry of a tensor holds, that all hold."""

    node: Node
    is_single: bool
    """Whether `node` has a batch of 1. Otherwise its first entry is meant."""


@dataclass(frozen=True)
class Segment:
    """Some keys in a row and their values."""

    key: Node
    value: Node
    shared_key: Shared | None
    shared_value: Shared | None

    @property
    def is_shared(self) -> bool:
        """Whether keys and values are the same for the whole batch."""
        return self.shared_key is not None and self.shared_value is not None

    @property
    def length(self) -> Any:
        """Keys in it."""
        return shape_of(self.key)[-2]


def segments_of(key: Node, value: Node) -> tuple[Segment, ...]:
    """The parts of keys `[b, hkv, s, d]` and their values, in order. Raises `Reject`."""
    keys, values = list(_parts(key)), list(_parts(value))
    require(len(keys) > 1, "", key)
    reason = f"the keys are {len(keys)} parts and the values {len(values)}, or parts of other lengths"
    alike = len(keys) == len(values)
    alike = alike and all(
        equal(shape_of(k)[-2:-1], shape_of(v)[-2:-1]) for k, v in zip(keys, values, strict=True)
    )
    require(alike, reason, value)
    for parts in (keys, values):
        dtypes = sorted({str(val(part).dtype) for part in parts})
        cast = f"parts of {' and '.join(dtypes)}, which are cast when they are joined; make them of one dtype"
        require(len(dtypes) == 1, cast, parts[0])
    return tuple(Segment(k, v, shared(k), shared(v)) for k, v in zip(keys, values, strict=True))


def _parts(node: Node) -> Iterator[Node]:
    """What a tensor of 4 dimensions is a concatenation of along its keys; itself if it is none."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if node.target is _aten.cat.default and dim in (2, -2) and len(shape_of(node)) == 4:
        for part in node.args[0]:  # type: ignore[union-attr]
            yield from _parts(part)  # type: ignore[arg-type]
    else:
        yield node


def shared(node: Node) -> Shared | None:
    """What every batch entry of `node` `[b, ...]` is equal to, if that is proved."""
    while node.target in _COPIES or _is_whole(node):
        node = node.args[0]  # type: ignore[assignment]
    sizes = shape_of(node)
    if statically_known_true(sizes[0] == 1):
        return Shared(node, is_single=True)
    if node.target in (_aten.expand.default, _aten.repeat.default):
        source = node.args[0]
        if isinstance(source, Node) and equal(shape_of(source), (1, *sizes[1:])):
            return Shared(source, is_single=True)
    stride = val(node).stride(0)
    if node.op == "placeholder" and isinstance(stride, int) and stride == 0:
        return Shared(node, is_single=False)
    return None


def _is_whole(node: Node) -> bool:
    """Whether it is an expansion that changes no size."""
    return node.target is _aten.expand.default and equal(shape_of(node.args[0]), shape_of(node))
