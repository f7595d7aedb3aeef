"""Attention of heads that see the first and the last tokens alone, beside heads that see all.

A query at position p of a streaming head sees, of the keys that its mask leaves it, those at positions above
p - recent and the first `sink` of its row, counted from the first key that the row's last query may see: a
row that is padded at the left keeps its sinks. Without a mask this is the op's own `low` and `anchors`.

Emits only. `attention_to_split` says first whether that is possible, and raises before anything is emitted.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.kept_keys import KeptKeys, SplitCache, kept_keys, split_of
from effopt.graph.analyses.layers import Layer, Stack, attention_of
from effopt.graph.ops.split_cache import row_starts
from effopt.graph.rewrite import Emit, PassResult, Reject, require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_UNKNOWN = {
    "bias": "adds a bias, which may hide keys: load the model with attn_implementation='sdpa'",
    "low": "is a sliding window already",
    "query_ids": "keeps documents or chunks apart, and each would need sinks of its own",
    "prefix": "sees a prefix ahead",
    "anchors": "has anchors already",
}
"""Arguments with which it is not known what a streaming head would see."""


def attention_to_split(layer: Layer) -> Node:
    """The one attention of a layer, if its heads can be made streaming. Raises `Reject` with the reason."""
    found = attention_of(layer)
    reason = f"{layer.path} holds {len(found) or 'no'} attention that was recognised, and one is needed"
    require(len(found) == 1, reason, layer.exit)
    _check(found[0])
    return found[0]


def kv_heads(pass_name: str, stack: Stack, result: PassResult) -> list[int]:
    """How many KV heads each layer has; 0 where they cannot be made streaming, and why in `result`."""
    found = []
    for layer in stack.layers:
        try:
            found.append(int(shape_of(attention_to_split(layer).args[1])[1]))
        except Reject as why:
            result.reject(pass_name, why.node or layer.exit, str(why))
            found.append(0)
    return found


def require_fit(attention: Node, streaming: Sequence[int], sink: int, recent: int) -> None:
    """Refuse heads that are not there, and a cache that is split otherwise. Raises `Reject`."""
    count = shape_of(attention.args[1])[1]
    reason = f"KV head {streaming[-1]} is to stream, and there are {count}"
    require(streaming[-1] < count, reason, attention)
    cache = split_of(attention)
    if cache is not None:
        held = list(cache.streaming), cache.sink, cache.recent
        planned = list(streaming), sink, recent
        reason = f"the cache was made for another plan: heads, sink and recent are {held}, planned {planned}"
        require(held == planned, reason, attention)


def _check(attention: Node) -> None:
    query, key = attention.args[:2]
    t, s = shape_of(query)[-2:-1], shape_of(key)[-2:-1]
    require(len(shape_of(query)) == 4, f"its query is {list(shape_of(query))}, not [b, h, t, d]", attention)
    bound = ops.attention.bind(attention.args, attention.kwargs)
    for name, word in _UNKNOWN.items():
        require(bound[name] is None, f"it {word}", attention)
    require(not bound["dropout_p"], "it drops weights at random: call model.eval()", attention)
    mask = bound["mask"]
    if mask is not None:
        sizes = shape_of(mask)
        is_plain = len(sizes) == 4 and equal(sizes[1:2], (1,)) and equal(sizes[-1:], s)
        require(is_plain, f"its mask is {list(sizes)}: expected [b, 1, t, s] or [b, 1, 1, s]", attention)
    found = split_of(attention)
    if found is None:
        kept_keys(attention)
    elif found.positions is None:
        is_causal = bound["is_causal"] or bound["high"] is not None
        is_causal = is_causal or (mask is not None and equal(shape_of(mask)[-2:-1], t))
        require(is_causal, "no mask hides later keys from a query", attention)


def split_heads(emit: Emit, attention: Node, streaming: Sequence[int], sink: int, recent: int) -> Node:
    """Emit the attention of both kinds of heads, `[b, h, t, dv]` in head order.

    Args:
        emit: writes before the attention.
        attention: of `attention_to_split`.
        streaming: KV heads, ascending; each with the query heads that read it.
        sink: first tokens that they see.
        recent: last tokens that they see, the query's own among them.
    """
    query, key, value = attention.args[:3]
    count = int(shape_of(key)[1])
    group = int(shape_of(query)[1]) // count
    others = [head for head in range(count) if head not in streaming]
    cache = split_of(attention)
    outputs: list[Node] = []
    for heads in (others, streaming):
        if not heads:
            continue
        mine = [head * group + i for head in heads for i in range(group)]
        part = {"query": pick(emit, query, mine), **_options(emit, attention, mine)}
        if cache is None:
            part |= {"key": pick(emit, key, heads), "value": pick(emit, value, heads)}
        else:
            pair = _first_keys(emit, cache) if heads is others else cache.held
            part |= dict(zip(("key", "value"), pair, strict=True))
        if heads is streaming and (cache is None or cache.positions is None):
            at = KeptKeys(offset=0) if cache else kept_keys(attention)
            part |= _near_and_first(emit, part, at, sink, recent)
        elif heads is streaming and cache is not None:
            part = _of_held(emit, part, cache)
        outputs.append(_attend(emit, part))
    return _in_head_order(emit, outputs, others, streaming, group)


def all_streaming(emit: Emit, attention: Node, sink: int, recent: int) -> Node:
    """Emit the attention as if all its heads were streaming, over the same keys."""
    part = dict(zip(("query", "key", "value"), attention.args, strict=True)) | dict(attention.kwargs)
    return _attend(emit, part | _near_and_first(emit, part, kept_keys(attention), sink, recent))


def set_starts(emit: Emit, attention: Node) -> None:
    """Tell a split cache where each row begins, by the mask: from then on it keeps the row's own sinks.

    What is emitted may be read by nodes before it: sort the graph afterwards.
    """
    cache = split_of(attention)
    if cache is None or cache.starts.target is not row_starts._opoverload:
        return
    rows = cache.starts.args[0]
    for _ in range(3):
        rows = emit(_aten.select.int, rows, 1, 0)
    starts = emit(_aten.zeros_like.default, rows, dtype=torch.int64)
    mask = attention.kwargs.get("mask")
    if isinstance(mask, Node):
        starts = emit(_aten.add.Tensor, starts, _first_seen(emit, mask))
    cache.starts.replace_all_uses_with(starts)


def pick(emit: Emit, node: Any, heads: Sequence[int], dim: int = 1) -> Node:
    """Emit some entries of a dimension: a view where they are neighbours."""
    count = int(shape_of(node)[dim])
    if list(heads) == list(range(count)):
        return node
    parts = [emit(_aten.slice.Tensor, node, dim, first, last) for first, last in _runs(heads)]
    return parts[0] if len(parts) == 1 else emit(_aten.cat.default, parts, dim)


def _first_keys(emit: Emit, cache: SplitCache) -> Sequence[Node]:
    if cache.length is None:
        return cache.kept
    return [emit(_aten.slice.Tensor, node, 2, 0, cache.length) for node in cache.kept]


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of each run of neighbours."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield members[0], members[-1] + 1


def _options(emit: Emit, attention: Node, heads: Sequence[int]) -> dict[str, Any]:
    kwargs = dict(attention.kwargs)
    if kwargs.get("sinks") is not None:
        kwargs["sinks"] = pick(emit, kwargs["sinks"], heads, dim=0)
    return kwargs


def _attend(emit: Emit, part: Mapping[str, Any]) -> Node:
    operands = [part[name] for name in ("query", "key", "value")]
    given = {name: value for name, value in part.items() if name not in ("query", "key", "value")}
    return emit(ops.attention, *operands, **given)


def _in_head_order(
    emit: Emit, outputs: Sequence[Node], others: Sequence[int], streaming: Sequence[int], group: int
) -> Node:
    if len(outputs) == 1:
        return outputs[0]
    place = {head: (0, i) for i, head in enumerate(others)} | {h: (1, i) for i, h in enumerate(streaming)}
    in_order = [place[head] for head in sorted(place)]
    pieces = []
    for which, run in itertools.groupby(in_order, key=lambda p: p[0]):
        rows = [i * group + j for _, i in run for j in range(group)]
        pieces.append(pick(emit, outputs[which], rows))
    return emit(_aten.cat.default, pieces, 1)


def _near_and_first(
    emit: Emit, part: Mapping[str, Any], at: KeptKeys, sink: int, recent: int
) -> dict[str, Any]:
    """Arguments that hide what lies between the sinks and the last keys: over ordinary keys."""
    query, key, mask = part["query"], part["key"], part.get("mask")
    if mask is not None and not equal(shape_of(mask)[-1:], shape_of(key)[-2:-1]):
        mask = emit(_aten.slice.Tensor, mask, 3, 0, _size(emit, key, 2))  # of a cache that is not full yet
    first = at.first(emit)
    if mask is None and first is not None:
        return {"low": _plus(emit, first, 1 - recent), "anchors": sink}
    keys = _range(emit, key, 2)
    rows = at.positions
    if rows is None:
        rows = emit(_aten.add.Tensor, _range(emit, query, 2), first)
    reach = emit(_aten.unsqueeze.default, emit(_aten.sub.Tensor, rows, recent), 1)
    near = emit(_aten.gt.Tensor, keys, reach)
    if mask is None:
        seen = emit(_aten.logical_or.default, near, emit(_aten.lt.Scalar, keys, sink))
        return {"mask": emit(_aten.unsqueeze.default, emit(_aten.unsqueeze.default, seen, 0), 0)}
    starts = emit(_aten.reshape.default, _first_seen(emit, mask), [-1, 1, 1, 1])
    apart = emit(_aten.sub.Tensor, keys, starts)
    is_sink = emit(
        _aten.logical_and.default, emit(_aten.ge.Scalar, apart, 0), emit(_aten.lt.Scalar, apart, sink)
    )
    seen = emit(_aten.logical_or.default, near, is_sink)
    return {"mask": emit(_aten.logical_and.default, mask, seen)}


def _of_held(emit: Emit, part: Mapping[str, Any], cache: SplitCache) -> dict[str, Any]:
    """The call over what a cache holds, each key told by its position."""
    kept = {name: value for name, value in part.items() if name not in ("mask", "high", "is_causal")}
    mask, high = part.get("mask"), 0 if part.get("is_causal") else part.get("high")
    at = emit(_aten.unsqueeze.default, emit(_aten.unsqueeze.default, cache.positions, 1), 1)
    rows = emit(_aten.unsqueeze.default, cache.queries, 1)
    near = emit(_aten.gt.Tensor, at, emit(_aten.sub.Tensor, rows, cache.recent))
    last = emit(_aten.logical_and.default, near, emit(_aten.le.Tensor, at, rows))
    is_sink = emit(_aten.lt.Scalar, _range(emit, part["key"], 2), cache.sink)
    # A sink that is among the last keys too is seen there, and not twice.
    seen = emit(_aten.where.self, is_sink, emit(_aten.logical_not.default, near), last)
    seen = emit(_aten.logical_and.default, seen, emit(_aten.ge.Scalar, at, 0))
    if high is not None:
        limit = emit(_aten.add.Tensor, _range(emit, part["query"], 2), high)
        limit = emit(_aten.unsqueeze.default, limit, 1)
        seen = emit(_aten.logical_and.default, seen, emit(_aten.le.Tensor, at, limit))
    if mask is not None:
        seen = emit(_aten.logical_and.default, seen, _at_positions(emit, mask, at))
    elif high is None:
        kept["rows_see_key"] = True  # its own
    return kept | {"mask": seen}


def _at_positions(emit: Emit, mask: Node, at: Node) -> Node:
    """`mask` `[b or 1, 1, t or 1, s]` at key positions `[b, 1, 1, m]`; at position 0 where there is none."""
    # Not take_along_dim, whose kernel for fake tensors fixes symbolic sizes at what they are now.
    if not equal(shape_of(mask)[:1], shape_of(at)[:1]):
        never = emit(_aten.lt.Scalar, emit(_aten.slice.Tensor, at, 3, 0, 1), -1)
        mask = emit(_aten.logical_or.default, mask, never)
    rows = emit(_aten.zeros_like.default, emit(_aten.slice.Tensor, mask, 3, 0, 1), dtype=torch.int64)
    index = emit(_aten.add.Tensor, rows, emit(_aten.clamp_min.default, at, 0))
    return emit(_aten.gather.default, mask, 3, index)


def _first_seen(emit: Emit, mask: Node) -> Node:
    """The first key that the last query of each row may see, int64 `[b]`; 0 where it sees none."""
    rows = emit(_aten.select.int, emit(_aten.select.int, mask, 1, 0), 1, -1)
    return emit(_aten.argmax.default, emit(_aten._to_copy.default, rows, dtype=torch.int32), 1)


def _size(emit: Emit, node: Node, dim: int) -> Any:
    size = shape_of(node)[dim]
    return size if isinstance(size, int) else emit(_aten.sym_size.int, node, dim)


def _range(emit: Emit, node: Node, dim: int) -> Node:
    return emit(_aten.arange.default, _size(emit, node, dim), device=val(node).device)


def _plus(emit: Emit, size: int | Node, by: int) -> int | Node:
    return size + by if isinstance(size, int) else emit(operator.add, size, by)
