"""At prefill, read the first keys and those around each query, in whole blocks.

    attention(q, k, v, is_causal)  =>  block_sparse_attention(q, k, v, local_blocks(sink, window), is_causal)

Lossy: `sink` and `window` are keys; with a window of all keys it is exact. Needs no training and no data;
inference only. Causal, or self-attention without (then a window on both sides). Saves all blocks between sink
and window: `window + sink` keys a query are left, whatever the length. Decoding steps read all keys.

Source: Xiao et al. 2023, arXiv:2309.17453, section 3.2 (sink and window; there the cache forgets the rest).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.ops.base import hint
from effopt.graph.ops.block_sparse_attention import share_of_pairs
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import shape_of
from effopt.passes.base import Example, option
from effopt.passes.block_selector import BlockSelector, Prefill


@dataclass(frozen=True)
class KeepSinkAndLocalBlocks(BlockSelector):
    """The same blocks for all heads: those of the sink, and those of the window."""

    name: ClassVar[str] = "keep-sink-and-local-blocks"

    sink: int = option(64, "first keys that every query reads, rounded up to blocks", min=0)
    window: int = option(1024, "keys back from a query, itself included, that it reads at least", min=1)

    def fits(self, call: Prefill, form: Mapping[str, Any], node: Node) -> None:
        t, s = shape_of(call.query)[-2], shape_of(call.key)[-2]
        places = f"{t} queries over {s} keys: which of these are near is not known"
        require(call.is_causal or bool(t == s), places, node)

    def select(self, emit: Emit, call: Prefill, form: Mapping[str, Any]) -> Node:
        settings = {name: form[name] for name in ("block", "sink", "window")}
        given = {"is_causal": True} if call.is_causal else {}
        return emit(ops.local_blocks, call.query, call.key, **settings, **given)

    def density(self, call: Prefill, form: Mapping[str, Any]) -> float:
        """What it selects, counted."""
        t, s = (hint(shape_of(x)[-2]) for x in (call.query, call.key))
        places = torch.empty(1, 1, t, 1), torch.empty(1, 1, s, 1)
        blocks = ops.local_blocks.reference(*places, **form, is_causal=call.is_causal)
        return share_of_pairs(blocks, t, s, form["block"], call.is_causal)

    def samples(self) -> Iterable[Example]:
        q, sdpa = torch.randn(1, 2, 1500, 4), torch.nn.functional.scaled_dot_product_attention
        yield Example(lambda q: sdpa(q, q, q, is_causal=True), (q,), training=False)
        yield Example(lambda q: sdpa(q, q, q), (q,), training=False)

    def refusals(self) -> Iterable[Example]:
        q, sdpa = torch.randn(1, 2, 300, 8), torch.nn.functional.scaled_dot_product_attention
        over = lambda q, k: sdpa(q, k, k)  # noqa: E731
        yield Example(over, (q, torch.randn(1, 2, 77, 8)), "300 queries over 77 keys")
        yield Example(over, (q[:, :, :1], q), "a decoding step reads all keys")
        yield Example(lambda q: sdpa(q, q, q, is_causal=True), (q,), "training", training=True)
