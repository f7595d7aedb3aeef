"""Let some heads see only the first and the last tokens, and keep no more of them.

    y = attention(q, k, v)
      =>  y = cat(attention(q0, k0, v0), attention(q1, k1, v1, anchors=sink, low=-(recent - 1)))

for layers with one causal attention; a KV head goes with the query heads that read it. Lossy; knobs:
`retrieval` (share of a stack's KV heads that see all), `sink`, `recent`. Needs calibration: a head's score is
the relative squared error of its output if it streams, for which DuoAttention trains its gates: `plan =
effopt.calibrate(model, batches, "split-heads-by-role")`, then `options={"plans": plan}`. Saves scores in
long prompts, and with `effopt.cache_for(model, plan)` keys and values beyond sink + recent; an ordinary cache
works, and keeps all of them.
Source: Xiao et al. 2024, arXiv:2410.10819, section 2 (DuoAttention); Yang et al. 2025, arXiv:2502.14866
(LServe: both kinds of heads in one layer); sinks: Xiao et al. 2023, arXiv:2309.17453.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from effopt.errors import PlanError
from effopt.graph import streaming
from effopt.graph.analyses.layers import Layer, Stack
from effopt.graph.dataflow import sort_topologically
from effopt.graph.rewrite import Emit, PassResult, Reject
from effopt.passes.base import Example, Stage, option
from effopt.passes.region import RegionPass


@dataclass(frozen=True)
class SplitHeadsByRole(RegionPass):
    """Decides for each layer which KV heads stream, and what they see."""

    name: ClassVar[str] = "split-heads-by-role"
    stage: ClassVar[Stage] = Stage.ATTENTION
    requires: ClassVar[tuple[str, ...]] = ("recognize-attention",)
    # Masks are then numbers where that is proved, and what is left of them is padding.
    after: ClassVar[tuple[str, ...]] = ("prove-causal", "recover-mask-structure", "prove-rows-see-key")
    conflicts: ClassVar[tuple[str, ...]] = ("share-kv-across-layers",)
    is_scored: ClassVar[bool] = True
    scores_parts: ClassVar[bool] = True

    retrieval: float = option(0.5, "share of the KV heads of each stack that see all keys", min=0, max=1)
    sink: int = option(4, "first tokens that the other heads see", min=1)
    recent: int = option(64, "last tokens that the other heads see", min=1)

    def observe(self, layer: Layer) -> tuple[Node, ...]:
        """What the layer's attention gives, and what it would give if all its heads were streaming."""
        try:
            attention = streaming.attention_to_split(layer)
        except Reject:
            return ()
        emit = Emit(attention.graph, attention, attention.next, self.name)
        alone = streaming.all_streaming(emit, attention, self.sink, self.recent)
        return attention, alone, attention.all_input_nodes[1]

    def score(self, *values: Tensor) -> Tensor:
        """Relative squared error of each KV head, `[b, hkv]`, of outputs `[b, h, t, dv]`."""
        full, alone, key = values
        wide = torch.promote_types(full.dtype, torch.float32)
        error, size = (x.to(wide).square().sum((2, 3)) for x in (full - alone, full))
        error, size = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (error, size))
        return error / size.clamp_min(torch.finfo(wide).tiny)

    def decide(self, stack: Stack, scores: Sequence[Any] | None, result: PassResult) -> Sequence[Any]:
        """`round(retrieval * count)` heads, those of the greatest errors, see all; of equals the first."""
        assert scores is not None, "a scored pass decides on scores"
        heads: list[tuple[float, int, int]] = []
        for position, (count, given) in enumerate(
            zip(streaming.kv_heads(self.name, stack, result), scores, strict=True)
        ):
            # One number is that of all heads of a layer.
            errors = given if isinstance(given, (list, tuple)) else [given or 0.0] * count
            heads += [(-error, position, head) for head, error in enumerate(errors[:count])]
        left = round(self.retrieval * len(heads))
        if heads and left < len(heads) and not any(error for error, *_ in heads):
            raise PlanError(
                f"{self.spec()} found no difference between heads: the batches must be longer than"
                f" sink + recent, {self.sink + self.recent} tokens"
            )
        chosen = sorted(heads)[left:]
        streams = [sorted(h for _, p, h in chosen if p == i) for i in range(len(stack.layers))]
        return [self._decision(these) for these in streams]

    def _decision(self, heads: Sequence[int]) -> Any:
        return {"streaming": list(heads), "sink": self.sink, "recent": self.recent} if heads else None

    def choices_in(self, stack: Stack, result: PassResult) -> Sequence[Sequence[Any]]:
        """All KV heads of a layer, or all but one."""
        return [
            [
                self._decision(heads)
                for kept in (None, *range(n))
                if (heads := [h for h in range(n) if h != kept])
            ]
            for n in streaming.kv_heads(self.name, stack, result)
        ]

    def enact(self, stack: Stack, decisions: Sequence[Any], graph: Graph, result: PassResult) -> None:
        """Split each attention; the cache that it reads, if that is split, must be split alike."""
        chosen = [(layer, d) for layer, d in zip(stack.layers, decisions, strict=True) if d is not None]
        attentions = [streaming.attention_to_split(layer) for layer, _ in chosen]
        for attention, (_, decision) in zip(attentions, chosen, strict=True):
            streaming.require_fit(attention, **decision)
        for attention, (_, decision) in zip(attentions, chosen, strict=True):
            emit = Emit(graph, attention, attention, self.name)
            streaming.set_starts(emit, attention)
            attention.replace_all_uses_with(streaming.split_heads(emit, attention, **decision))
            note = f"KV heads {decision['streaming']} see {decision['sink']} + {decision['recent']} tokens"
            result.apply(self.name, "attention", attention, note)
            graph.erase_node(attention)
        sort_topologically(graph)

    def samples(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 16)
        yield Example(nn.Sequential(*(_Layer() for _ in range(3))), (x,))

    def refusals(self) -> Iterable[Example]:
        for layer, reason in (
            (_Layer(is_causal=False), "a query may see later keys"),
            (_Layer(window=3), "it is a sliding window already"),
            (_Layer(attends=False), "0 holds no attention that was recognised"),
        ):
            yield Example(nn.Sequential(layer, layer), (torch.randn(2, 5, 16),), reason)


class _Layer(nn.Module):
    """Four query heads and two KV heads on 16 features; a query sees itself and what is before it, or all."""

    def __init__(self, is_causal: bool = True, window: int = 9, attends: bool = True) -> None:
        super().__init__()
        self.qkv, self.is_causal, self.window, self.attends = nn.Linear(16, 32), is_causal, window, attends

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 4)).transpose(1, 2).split([4, 2, 2], 1)
        if not self.attends:
            return x + x.tanh()
        near = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(1 - self.window)
        y = F.scaled_dot_product_attention(q, k, v, near if self.is_causal else None, enable_gqa=True)
        return x + y.transpose(1, 2).flatten(2)
