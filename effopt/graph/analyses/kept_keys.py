"""How the keys of an attention are kept from call to call, and so at which position each query stands.

    key = cat([past, new])                          the queries are the last, the first of them at len(past)
    key = index_copy(cache, 2, positions, new)      the queries stand at `positions`
    key = split_cache(kept, held, ...)              so does the cache say
    keys of these queries alone, masked causally    the first query is at 0, or where the band ends

Looks only. A query of attention in both directions, or over keys of something else, stands nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses.heads import equal
from effopt.graph.ops.base import bind_schema
from effopt.graph.ops.split_cache import split_cache
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import shape_of

_aten = torch.ops.aten
SPLIT = split_cache._opoverload


@dataclass(frozen=True)
class KeptKeys:
    """Where the queries stand among the keys: one of the three is given."""

    offset: int | Node | None = None
    """Position of the first query: a number, or a node that is one; the others follow it."""
    past: Node | None = None
    """Keys before the first query, `[b, hkv, s, d]`: as many as its position."""
    positions: Node | None = None
    """Position of each query, int64 `[t]`."""

    def first(self, emit: Emit) -> int | Node | None:
        """Position of the first query as a number or a node; None if only tensors say it."""
        if self.past is None:
            return self.offset
        size = shape_of(self.past)[-2]
        return size if isinstance(size, int) else emit(_aten.sym_size.int, self.past, 2)


@dataclass(frozen=True)
class SplitCache:
    """What a cache holds of the keys and of the values of a layer whose heads keep caches of two kinds."""

    kept: tuple[Node, Node]
    """Keys and values of the other heads."""
    held: tuple[Node, Node]
    """Those of the streaming heads."""
    length: Any
    """How many of the other heads' keys are read, a number or a node; None: all. They are the first ones."""
    queries: Node
    starts: Node
    positions: Node | None
    streaming: tuple[int, ...]
    sink: int
    recent: int


def split_of(attention: Node) -> SplitCache | None:
    """The two caches that an attention reads, or None if it reads one. Raises `Reject` if it mixes them."""
    (key, of_keys), (value, of_values) = (_without_slice(node) for node in attention.all_input_nodes[1:3])
    is_split = [node.target is SPLIT for node in (key, value)]
    if not any(is_split):
        return None
    require(
        all(is_split), "its keys are split by the cache and its values are not, or the reverse", attention
    )
    of_key, of_value = (bind_schema(SPLIT, node.args, node.kwargs) for node in (key, value))
    shared = ("queries", "positions", "streaming", "sink", "recent")
    alike = of_keys == of_values and all(of_key[name] == of_value[name] for name in shared)
    require(alike, "its keys and its values are split differently", attention)
    is_whole = of_keys is None or of_key["positions"] is None
    require(is_whole, "it reads a part of the keys of a cache that is not empty", attention)
    return SplitCache(
        (of_key["kept"], of_value["kept"]),
        (of_key["held"], of_value["held"]),
        of_keys,
        of_key["queries"],
        of_key["starts"],
        of_key["positions"],
        tuple(of_key["streaming"]),
        of_key["sink"],
        of_key["recent"],
    )


def _without_slice(node: Node) -> tuple[Node, Any]:
    """What the first keys are a slice of, and how many they are; None: all."""
    source = node.args[0] if node.target is _aten.slice.Tensor else None
    if not isinstance(source, Node) or source.target is not SPLIT or len(node.args) != 4:
        return node, None
    _, dim, first, behind = node.args
    return (source, behind) if dim in (2, -2) and first in (0, None) else (node, None)


def kept_keys(attention: Node) -> KeptKeys:
    """Where the queries of an attention over ordinary keys stand. Raises `Reject`; nothing is changed."""
    query, key = attention.args[:2]
    t, s = shape_of(query)[-2], shape_of(key)[-2]
    bound = ops.attention.bind(attention.args, attention.kwargs)
    assert isinstance(key, Node)
    if bound["is_causal"]:
        return KeptKeys(offset=0)
    if key.target is _aten.index_copy.default and key.args[1] in (2, -2):
        positions, new = key.args[2:4]
        if isinstance(positions, Node) and equal(shape_of(new)[-2:-1], (t,)):
            return KeptKeys(positions=positions)
    is_one = equal((t,), (1,))
    mask = bound["mask"]
    hides_later = bound["high"] is not None or (mask is not None and not equal(shape_of(mask)[-2:-1], (1,)))
    pair = _past_and_new(key) if is_one or hides_later else None
    if pair is not None and equal(shape_of(pair[1])[-2:-1], (t,)):
        # An empty cache of `transformers` is a tensor of one dimension.
        return KeptKeys(past=pair[0]) if len(shape_of(pair[0])) == 4 else KeptKeys(offset=0)
    is_causal = bound["high"] is not None and equal((t,), (s,))
    reason = "a query may see later keys, or keys of something else: no mask or cache says where it stands"
    require(is_causal, reason, attention)
    return KeptKeys(offset=bound["high"])


def _past_and_new(key: Node) -> tuple[Node, Node] | None:
    if key.target is not _aten.cat.default or key.args[1:] not in ((-2,), (2,)):
        return None
    past, *rest = key.all_input_nodes
    return (past, rest[0]) if len(rest) == 1 else None
