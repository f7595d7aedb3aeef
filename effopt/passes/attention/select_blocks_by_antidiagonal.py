"""At prefill, read the blocks of keys that hold most of the weight, judged by antidiagonals of the scores.

    attention(q, k, v, is_causal)  =>  block_sparse_attention(q, k, v, antidiagonal_blocks(q, k), is_causal)

Lossy: `threshold` is the share of the weight that the blocks read are to hold, as the scores of antidiagonals
estimate it; 1 reads all, and is exact. Needs no training and no data; inference only. Causal or not. Saves
the blocks left out, most where weight is concentrated, for 1 / stride of the arithmetic of all scores, those
that causality hides included. Decoding steps read all keys, as in the paper.

Source: Xu et al. 2025, arXiv:2503.16428, sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.rewrite import Emit, require
from effopt.passes.base import Example, option
from effopt.passes.block_selector import BlockSelector, Prefill


@dataclass(frozen=True)
class SelectBlocksByAntidiagonal(BlockSelector):
    """For each head and block of queries, the fewest blocks of keys that reach `threshold`."""

    name: ClassVar[str] = "select-blocks-by-antidiagonal"

    threshold: float = option(0.9, "share of the estimated weight that is kept", min=0.0, max=1.0)
    stride: int = option(8, "tokens from one antidiagonal to the next; divides `block`", min=1, max=256)

    def fits(self, call: Prefill, form: Mapping[str, Any], node: Node) -> None:
        block, stride = form["block"], form["stride"]
        require(block % stride == 0, f"stride={stride} does not divide block={block}", node)

    def select(self, emit: Emit, call: Prefill, form: Mapping[str, Any]) -> Node:
        settings = {name: form[name] for name in ("block", "stride", "threshold")} | {"scale": call.scale}
        given: dict[str, Any] = {"is_causal": True} if call.is_causal else {}
        given |= {} if call.key_mask is None else {"key_mask": call.key_mask}
        return emit(ops.antidiagonal_blocks, call.query, call.key, **settings, **given)

    def density(self, call: Prefill, form: Mapping[str, Any]) -> float:
        """The most that it can be: as if weight were spread evenly."""
        return float(form["threshold"])

    def samples(self) -> Iterable[Example]:
        q, k = torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        causal = lambda q, k: sdpa(q, k, k, is_causal=True, enable_gqa=True)  # noqa: E731
        yield Example(causal, (q, k), training=False)
        yield Example(lambda q: (q @ q.mT * 0.3).softmax(-1) @ q, (q,), training=False)
        padded = lambda q, seen: sdpa(q, q, q, seen[:, None, None, :])  # noqa: E731
        yield Example(padded, (q, torch.arange(300)[None] > 9), training=False)

    def refusals(self) -> Iterable[Example]:
        q, sdpa = torch.randn(1, 2, 300, 8), torch.nn.functional.scaled_dot_product_attention
        step = lambda q, k: sdpa(q, k, k)  # noqa: E731
        yield Example(step, (q[:, :, :1], q), "a decoding step reads all keys")
        yield Example(step, (q[:, :, :99], q[:, :, :99]), "99 queries, fewer than least=256")
        yield Example(step, (q[0], q[0]), "3 dimensions")
        biased = lambda q, bias: (q @ q.mT + bias).softmax(-1) @ q  # noqa: E731
        yield Example(biased, (q, torch.randn(300, 300)), "bias: attention over blocks has none")
        masked = lambda q, seen: sdpa(q, q, q, seen)  # noqa: E731
        yield Example(masked, (q, torch.rand(300, 300) > 0.5), "not one row over keys")
        yield Example(lambda q: sdpa(q, q, q, is_causal=True), (q,), "training", training=True)

        def window(q: torch.Tensor) -> torch.Tensor:
            at = torch.arange(q.shape[2])
            near = (at <= at[:, None]) & (at > at[:, None] - 9)
            return sdpa(q, q, q, near)

        yield Example(window, (q,), "a window bounds the keys")

        def in_parts(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            seen = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + 7
            return sdpa(q, k, k, seen)

        yield Example(in_parts, (q, torch.randn(1, 2, 307, 8)), "a prompt in parts reads all keys")
