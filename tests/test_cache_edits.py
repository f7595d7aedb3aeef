"""Keys turned by a shift are the keys at the shifted positions: of the op, and of models of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import effopt
from effopt.cache_edits import turned
from effopt.errors import EffoptError
from effopt.graph import ops

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def build(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(kind, **{**SHAPE, **HEADS, **config})
    return transformers.AutoModelForCausalLM.from_config(made).eval()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("p", "shift"), [(0, 1), (100, -63), (5, 1000)])
@pytest.mark.parametrize("rotary", [8, 4])
def test_rotations_add_up(pairs: bool, p: int, shift: int, rotary: int) -> None:
    k = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    frequencies = 1e4 ** (-torch.arange(rotary // 2, dtype=torch.float64) * 2 / rotary)

    def at(position: int) -> torch.Tensor:
        angle = position * frequencies
        angle = angle.repeat_interleave(2) if pairs else torch.cat((angle, angle))
        return ops.rope.reference(k, angle.cos(), angle.sin(), interleaved=pairs)

    torch.testing.assert_close(turned(at(p), frequencies, shift, pairs), at(p + shift))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("cohere", {"pad_token_id": 0}),
        ("stablelm", {}),
    ],
    ids=["halves", "scaled", "pairs", "partial"],
)
def test_keys_of_a_model(kind: str, config: dict[str, Any]) -> None:
    """Of one layer, whose keys do not know the text before them, all keys are those of the moved text."""
    model = build(kind, num_hidden_layers=1, **config)
    cache, moved = transformers.DynamicCache(), transformers.DynamicCache()
    at = torch.arange(9)[None].expand(2, -1)
    with torch.no_grad():
        model(input_ids=IDS, position_ids=at, past_key_values=cache, use_cache=True)
        model(input_ids=IDS, position_ids=at + 7 * (at >= 4), past_key_values=moved, use_cache=True)
    effopt.rerotate(model, cache, 4, 7)
    torch.testing.assert_close(cache.layers[0].keys, moved.layers[0].keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.layers[0].values, moved.layers[0].values)


def test_there_and_back_in_a_static_cache() -> None:
    model = build("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    was = [(layer.keys.data_ptr(), layer.keys.clone()) for layer in cache.layers]
    effopt.rerotate(model, cache, 3, 5)
    assert not torch.equal(cache.layers[0].keys, was[0][1])
    effopt.rerotate(model, cache, 3, -3)
    effopt.rerotate(model, cache, 3, -2)
    for layer, (address, keys) in zip(cache.layers, was, strict=True):
        assert layer.keys.data_ptr() == address
        torch.testing.assert_close(layer.keys, keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "length"),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "0 rotary embeddings"),
        ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": 0}, "every layer"),
    ],
)
def test_other_rotations_are_refused(kind: str, config: dict[str, Any], reason: str) -> None:
    model, cache = build(kind, **config), transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    before = copy.deepcopy(cache)
    with pytest.raises(EffoptError, match=reason):
        effopt.rerotate(model, cache, 4, 7)
    assert torch.equal(cache.layers[0].keys, before.layers[0].keys)


def test_tokens_outside_of_the_cache_are_refused() -> None:
    model, cache = build("llama"), transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    for start, shift, stop in ((3, -4, None), (0, 1, 10), (5, 1, 4)):
        with pytest.raises(EffoptError, match="the cache holds positions 0 to 9"):
            effopt.rerotate(model, cache, start, shift, stop)
