"""At prefill, divide the context among heads: each reads a window, and every `stride`-th block before it.

    attention(q, k, v, is_causal)
        =>  block_sparse_attention(q, k, v, strided_blocks(stride, window), is_causal)

Lossy: `stride` is the knob; 1 reads all keys, and is exact. Heads begin at different blocks, so that together
they read all of the context: a stride above the number of heads is refused. Needs no data, but the paper
trains with it; a model that was not is harmed more. Inference only, causal only. Saves all but 1 / stride of
the blocks before the window. Decoding steps read all keys.

Source: Lin et al. 2024, arXiv:2407.17678.
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
class StrideBlocksByHead(BlockSelector):
    """Head i reads blocks j with (j + i) % stride == 0, and the window."""

    name: ClassVar[str] = "stride-blocks-by-head"
    causal: ClassVar[bool | None] = True

    stride: int = option(4, "blocks of a head's shard are so many apart", min=1, max=256)
    window: int = option(256, "keys back from a query, itself included, that every head reads", min=1)

    def fits(self, call: Prefill, form: Mapping[str, Any], node: Node) -> None:
        heads, stride = shape_of(call.query)[1], form["stride"]
        unread = f"stride={stride} over {heads} heads leaves blocks that no head reads"
        require(bool(stride <= heads), unread, node)

    def select(self, emit: Emit, call: Prefill, form: Mapping[str, Any]) -> Node:
        settings = {name: form[name] for name in ("block", "stride", "window")}
        return emit(ops.strided_blocks, call.query, call.key, **settings)

    def density(self, call: Prefill, form: Mapping[str, Any]) -> float:
        """What it selects, counted."""
        heads, t = (hint(size) for size in shape_of(call.query)[1:3])
        s = hint(shape_of(call.key)[-2])
        blocks = ops.strided_blocks.reference(
            torch.empty(1, heads, t, 1), torch.empty(1, heads, s, 1), **form
        )
        return share_of_pairs(blocks, t, s, form["block"], is_causal=True)

    def samples(self) -> Iterable[Example]:
        q, k = torch.randn(1, 4, 900, 8), torch.randn(1, 2, 900, 8)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        grouped = lambda q, k: sdpa(q, k, k, is_causal=True, enable_gqa=True)  # noqa: E731
        yield Example(grouped, (q, k), training=False)

    def refusals(self) -> Iterable[Example]:
        q, sdpa = torch.randn(1, 4, 300, 8), torch.nn.functional.scaled_dot_product_attention
        causal = lambda q: sdpa(q, q, q, is_causal=True)  # noqa: E731
        yield Example(causal, (q[:, :2],), "stride=4 over 2 heads leaves blocks")
        yield Example(lambda q: sdpa(q, q, q), (q,), "not causal")
        yield Example(causal, (q,), "training", training=True)
