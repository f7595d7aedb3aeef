"""A small model with random weights, texts to judge it by, and tradeoffs of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from effopt.quality.texts import Probe, Text, Tier
from effopt.tradeoff import Decoding, Row, Tradeoff, Way, measure

TIER = Tier(context=32, stride=16, rows=2, resamples=100)
DECODING = Decoding(prompt_tokens=8, cache_tokens=40, rounds=3, steps=2)
SAME, FEWER, PAIRS = "skip-layers{keep=1}", "skip-layers{layers=[1]}", "share-kv-across-layers{group=2}"
ELSEWHERE, NO_SUCH = "share-kv-across-layers{include=encoder.*}", "skip-layers{layers=[9]}"
INT8, INT4 = "quantize-weights{bits=8}", "quantize-weights{bits=4,group=16}"
BOTH = f"{INT8},{ELSEWHERE}"


def draw(count: int, seed: int) -> Tensor:
    return torch.randint(3, 100, (count,), generator=torch.Generator().manual_seed(seed))


TEXTS = tuple(Text(f"text {i}", draw(70, i)) for i in range(3))
PROBES = tuple(Probe(draw(32, 10 + i), (20, 22), 16) for i in range(2))


@cache
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,  # the default, 0.02, makes every model predict nearly the same
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def run(*ways: Way | str, model: nn.Module | None = None, **settings: Any) -> Tradeoff:
    given = {"probes": PROBES, "tier": TIER, "decoding": DECODING, "lowering": "eager", **settings}
    texts = given.pop("texts", TEXTS)
    asked = [Way(way) if isinstance(way, str) else way for way in ways]
    return measure(llama() if model is None else model, texts, asked, **given)


def row_of(result: Tradeoff, passes: str) -> Row:
    return next(row for row in result.rows if row.way.passes == passes)
