"""In an encoder, route each region of queries to the regions of keys that are nearest to it.

    attention(q, k, v)  =>  block_sparse_attention(q, k, v, region_blocks(q, k, count))

Lossy: `count` is the knob; with as many regions as there are it is exact. A region is a block of consecutive
tokens: an image whose tokens run row by row has strips for regions, not the squares of the paper. Inference
only, not causal: a mean over a region would tell its first queries of later keys. Needs no data, but the
paper trains with it. Saves all but `count * block` keys a query, for one product of region means.

Source: Zhu et al. 2023, arXiv:2303.08810.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.ops.base import hint
from effopt.graph.ops.block_sparse_attention import blocks_in
from effopt.graph.rewrite import Emit
from effopt.graph.values import shape_of
from effopt.passes.base import Example, option
from effopt.passes.block_selector import BlockSelector, Prefill


@dataclass(frozen=True)
class RouteAttentionByRegion(BlockSelector):
    """For each head and region of queries, the `count` regions of largest affinity."""

    name: ClassVar[str] = "route-attention-by-region"
    causal: ClassVar[bool | None] = False

    count: int = option(4, "regions of keys that a region of queries reads", min=1)

    def select(self, emit: Emit, call: Prefill, form: Mapping[str, Any]) -> Node:
        settings = {name: form[name] for name in ("block", "count")}
        given = {} if call.key_mask is None else {"key_mask": call.key_mask}
        return emit(ops.region_blocks, call.query, call.key, **settings, **given)

    def density(self, call: Prefill, form: Mapping[str, Any]) -> float:
        """All rows have the same number of regions."""
        return float(form["count"] / blocks_in(hint(shape_of(call.key)[-2]), form["block"]))

    def samples(self) -> Iterable[Example]:
        q, sdpa = torch.randn(2, 2, 600, 8), torch.nn.functional.scaled_dot_product_attention
        yield Example(lambda q: sdpa(q, q, q), (q,), training=False)
        padded = lambda q, seen: sdpa(q, q, q, seen[:, None, None, :])  # noqa: E731
        yield Example(padded, (q, torch.arange(600) > torch.tensor([[-1], [99]])), training=False)

    def refusals(self) -> Iterable[Example]:
        q, sdpa = torch.randn(1, 2, 300, 8), torch.nn.functional.scaled_dot_product_attention
        yield Example(lambda q: sdpa(q, q, q, is_causal=True), (q,), "causal, and what it selects")
        yield Example(lambda q: sdpa(q, q, q), (q[:, :, :50],), "50 queries, fewer than least=256")
        yield Example(lambda q: sdpa(q, q, q), (q,), "training", training=True)
