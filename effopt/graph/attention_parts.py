"""One attention written as several over parts of its keys, joined by their log-sum-exp.

`runs_of` says in which parts the keys are attended to, `refuse_hidden` which facts that takes, `write` emits.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.analyses.key_segments import Segment, Shared
from effopt.graph.ops.base import hint
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten


@dataclass(frozen=True)
class Run:
    """Segments that are attended to together: one that the batch shares, or several that it does not."""

    segments: tuple[Segment, ...]
    before: tuple[Segment, ...]
    """All segments that come earlier."""

    @property
    def is_shared(self) -> bool:
        return self.segments[0].is_shared

    @property
    def first(self) -> Any:
        """Index of its first key, perhaps symbolic."""
        return sum(s.length for s in self.before)

    @property
    def stop(self) -> Any:
        return self.first + sum(s.length for s in self.segments)


def runs_of(segments: Sequence[Segment]) -> tuple[Run, ...]:
    """Each shared segment alone, and the others between them together."""
    runs: list[Run] = []
    for i, segment in enumerate(segments):
        if runs and not segment.is_shared and not runs[-1].is_shared:
            runs[-1] = Run((*runs[-1].segments, segment), runs[-1].before)
        else:
            runs.append(Run((segment,), tuple(segments[:i])))
    return tuple(runs)


def refuse_hidden(runs: Sequence[Run], t: Any, low: Any, high: Any, root: Node) -> None:
    """Raise `Reject` unless a band leaves every shared key to every one of `t` queries."""
    for run in (r for r in runs if r.is_shared):
        keys = f"keys {run.first} to {run.stop} that the batch shares"
        before = high is None or statically_known_true(val(high) >= run.stop - 1)
        require(before, f"causal inside the {keys}: query 0 sees keys up to {val(high)}", root)
        after = low is None or statically_known_true(t - 1 + val(low) <= run.first)
        require(after, f"a window hides some of the {keys} from the last query", root)


def saved_bytes(query: Node, runs: Sequence[Run], mask: Node | None) -> tuple[int, int]:
    """Bytes of keys and values that are no longer read, and bytes that joining the parts moves."""
    b, h, t, d = (hint(n) for n in shape_of(query))
    size, dv = val(query).element_size(), hint(shape_of(runs[0].segments[0].value)[-1])
    saved = moved = 0
    for run in (r for r in runs if r.is_shared):
        keys, heads = hint(run.segments[0].length), hint(shape_of(run.segments[0].key)[1])
        saved += (b - 1) * keys * heads * (d + dv) * size
        # Its query is laid out anew, its result written, read and joined, the other result read again.
        moved += 2 * b * h * t * (d * size if t > 1 else 0) + 4 * b * h * t * (dv * size + 4)
        moved += 0 if mask is None else 2 * b * t * keys
    return saved, moved


def write(emit: Emit, query: Node, runs: Sequence[Run], told: Mapping[str, Any]) -> Node:
    """Emit the parts and their union.

    Args:
        emit: of the driver.
        query: `[b, h, t, d]`.
        runs: all keys.
        told: of the attention `scale`, `softcap`, `sinks`, `mask` (of 4 dimensions), `low` and `high`.
    """
    joined: tuple[Node, Node] | None = None
    for i, run in enumerate(runs):
        kwargs = {"scale": told["scale"]}
        kwargs |= {"softcap": told["softcap"]} if told["softcap"] else {}
        if told["sinks"] is not None and i == len(runs) - 1:  # they are one more key: of one part alone
            kwargs["sinks"] = told["sinks"]
        mask = None if told["mask"] is None else _mask_of(emit, told["mask"], run)
        part = (_shared_part if run.is_shared else _own_part)(emit, query, run, mask, told, kwargs)
        if joined is not None:
            both = emit(ops.merge_attention, *joined, *part)
            part = (emit(operator.getitem, both, 0), emit(operator.getitem, both, 1))
        joined = part
    assert joined is not None
    return joined[0]


def _own_part(
    emit: Emit, query: Node, run: Run, mask: Node | None, told: Mapping[str, Any], kwargs: dict[str, Any]
) -> tuple[Node, Node]:
    keys, values = ([getattr(s, name) for s in run.segments] for name in ("key", "value"))
    key, value = (x[0] if len(x) == 1 else emit(_aten.cat.default, x, -2) for x in (keys, values))
    for name in ("low", "high"):
        if told[name] is not None:
            kwargs[name] = _less(emit, told[name], _length(emit, run.before))
    if mask is not None:
        kwargs["mask"] = mask
    both = emit(ops.attention_lse, query, key, value, **kwargs)
    return emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)


def _shared_part(
    emit: Emit, query: Node, run: Run, mask: Node | None, told: Mapping[str, Any], kwargs: dict[str, Any]
) -> tuple[Node, Node]:
    """Over a shared segment, the queries of all batch entries as those of one."""
    (segment,) = run.segments
    b, h, t, d = (_size(emit, query, dim) for dim in range(4))
    dv = _size(emit, segment.value, 3)
    if mask is not None:
        rows = emit(_aten.expand.default, mask, [b, -1, t, -1])
        kwargs["mask"] = _folded(emit, rows, _size(emit, rows, 1), _length(emit, run.segments))
    key, value = (_single(emit, s) for s in (segment.shared_key, segment.shared_value))
    both = emit(ops.attention_lse, _folded(emit, query, h, d), key, value, **kwargs)
    out, lse = emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)
    out = emit(_aten.transpose.int, emit(_aten.reshape.default, out, [h, b, t, dv]), 0, 1)
    lse = emit(_aten.transpose.int, emit(_aten.reshape.default, lse, [h, b, t]), 0, 1)
    return out, lse


def _folded(emit: Emit, node: Node, heads: Any, last: Any) -> Node:
    """`[1, heads, b * t, last]` of `[b, heads, t, last]`."""
    return emit(_aten.reshape.default, emit(_aten.transpose.int, node, 0, 1), [1, heads, -1, last])


def _single(emit: Emit, part: Shared | None) -> Node:
    assert part is not None
    return part.node if part.is_single else emit(_aten.slice.Tensor, part.node, 0, 0, 1)


def _mask_of(emit: Emit, mask: Node, run: Run) -> Node:
    """What a mask says of the keys of a run."""
    if statically_known_true(shape_of(mask)[-1] == 1):
        return mask
    first = _length(emit, run.before)
    stop = _sum(emit, [first, _length(emit, run.segments)])
    return emit(_aten.slice.Tensor, mask, -1, first, stop)


def _size(emit: Emit, node: Node, dim: int) -> Any:
    size = shape_of(node)[dim]
    return size if isinstance(size, int) else emit(_aten.sym_size.int, node, dim % len(shape_of(node)))


def _length(emit: Emit, segments: Sequence[Segment]) -> Any:
    """Keys in some segments: a number, or a node."""
    return _sum(emit, [_size(emit, s.key, 2) for s in segments])


def _sum(emit: Emit, sizes: Sequence[Any]) -> Any:
    total: Any = sum(s for s in sizes if isinstance(s, int))
    for node in (s for s in sizes if not isinstance(s, int)):
        total = node if isinstance(total, int) and total == 0 else emit(operator.add, node, total)
    return total


def _less(emit: Emit, bound: Any, by: Any) -> Any:
    if isinstance(bound, int) and isinstance(by, int):
        return bound - by
    return bound if isinstance(by, int) and by == 0 else emit(operator.sub, bound, by)
