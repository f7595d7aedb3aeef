"""Greedy decoding to be timed: the tokens of `generate`, as often as one likes, and the bytes held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effopt
from effopt.decoding import Decoder, storage_bytes, weight_bytes
from effopt.errors import OptionError
from tests.models.architectures import build

PROMPT = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(3))


def llama() -> Any:
    torch.manual_seed(0)
    return build("llama", "sdpa", use_cache=True)[0]


def greedy(model: Any, count: int) -> list[int]:
    """Without a cache: the whole text is read for each token."""
    ids = PROMPT
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], -1)
    return ids[0, PROMPT.shape[1] :].tolist()


def decoded(decoder: Decoder, count: int) -> list[int]:
    return [int(decoder.decode(1)) for _ in range(count)]


@torch.no_grad()
@pytest.mark.parametrize("spec", ["", "share-kv-across-layers"])
def test_tokens_are_the_greedy_ones_and_again_after_the_cache_was_full(spec: str) -> None:
    model = llama()
    plan = effopt.Plan(())
    forward = model.forward
    if spec:
        plan = effopt.calibrate(model, [{"input_ids": PROMPT, "use_cache": False}], spec)
        options = {"plans": plan, "lowering": "eager"}
        forward = torch.compile(model.forward, backend="effopt", dynamic=False, options=options)
    decoder = Decoder(forward, effopt.cache_for(model, plan, max_cache_len=10), PROMPT, 10)
    decoder.begin()
    first = int(decoder._next)
    tokens = decoded(decoder, 4)
    if not spec:
        assert [first, *tokens] == greedy(model, 5)
    assert decoded(decoder, 4) == tokens  # the cache was full: the prompt was read again
    assert decoder.kv_bytes == (2 if not spec else 1) * 2 * 2 * 10 * 16 * 4


def test_timing_takes_whole_steps_that_fit() -> None:
    model = llama()
    calls: list[tuple[int, ...]] = []

    def counting(**inputs: Any) -> Any:
        calls.append(tuple(inputs["input_ids"].shape))
        return model.forward(**inputs)

    decoder = Decoder(counting, effopt.cache_for(model, effopt.Plan(()), max_cache_len=10), PROMPT, 10)
    assert decoder.room == 4
    assert decoder.seconds_a_token(3) > 0
    assert calls == [(1, 6), (1, 1), (1, 1), (1, 1)]
    calls.clear()
    assert decoder.seconds_a_token(9) > 0  # one is left of four: begins anew, and takes the four that fit
    assert calls == [(1, 6), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_a_cache_without_room_is_an_error() -> None:
    model = llama()
    with pytest.raises(OptionError, match="a cache of 6 tokens has no room to decode after a prompt of 6"):
        Decoder(model.forward, effopt.cache_for(model, effopt.Plan(()), max_cache_len=6), PROMPT, 6)


def test_storages_count_once() -> None:
    base = torch.zeros(8)
    assert storage_bytes([base, base[2:4], base.view(2, 4)]) == 32
    assert storage_bytes([]) == 0
    assert storage_bytes([torch.empty(0), base]) == 32


def test_weights_are_parameters_and_what_graphs_derived() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).eval()
    assert weight_bytes(model) == 4 * 64 * 32
    options = {"passes": "quantize-weights{bits=8}", "lowering": "eager", "release_weights": True}
    compiled = torch.compile(model, backend="effopt", options=options)
    with torch.no_grad():
        result: Tensor = compiled(torch.randn(3, 64))
    assert result.shape == (3, 32)
    assert weight_bytes(model) == 64 * 32 + 4 * 32  # codes, and a scale for each row
