"""`effopt.cache_for`: sharing in eager `generate`, token for token; lengths, masks and bytes; bad plans."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from effopt.cache_layers import AbsentLayer
from effopt.cache_layout import build
from effopt.caches import cache_for
from effopt.errors import EffoptError, PlanError
from effopt.passes.plan import Entry, Plan, PlannedStack, Section
from tests.models import architectures
from tests.models.eager_twin import twin_of

DEEP: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {"n_layer": 4},
    "mixtral": {},
    "gemma2": {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2},
}
PATHS = {"gpt2": "transformer.h", "t5": "decoder.block"}
NEW_TOKENS = 14  # with the prompt of 12, more than twice Gemma's window of 8


def model_of(name: str, attn: str = "sdpa") -> torch.nn.Module:
    """Four layers, weights large enough for the layers to matter."""
    if name == "t5":
        config = transformers.T5Config(
            d_model=64, d_kv=16, d_ff=112, num_layers=2, num_decoder_layers=4, num_heads=4, vocab_size=100,
            decoder_start_token_id=1, eos_token_id=2, pad_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
        config._attn_implementation = attn
        torch.manual_seed(0)
        model: Any = transformers.T5ForConditionalGeneration(config).eval()
    else:
        model = architectures.build(name, attn, use_cache=True, num_hidden_layers=4, **DEEP[name])[0]
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.mul_(4)
    return model


def plan_of(name: str, follows: dict[int, int], absent: Iterable[int] = (), count: int = 4) -> Plan:
    def section(spec: str, decisions: dict[int, Any], members: list[int]) -> Section:
        path = PATHS.get(name, "model.layers")
        entries = (Entry(f"{path}.{i}", "", decisions.get(i)) for i in members)
        return Section(spec, (PlannedStack(64, tuple(entries)),))

    left = [i for i in range(count) if i not in set(absent)]
    return Plan(
        (
            section("skip-layers", dict.fromkeys(absent, "skip"), list(range(count))),
            section("share-kv-across-layers", {i: left.index(lead) for i, lead in follows.items()}, left),
        )
    )


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the first padded at the left."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 100, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    return ids, mask


def generate(model: Any, cache: Any, beams: int = 1) -> list[list[int]]:
    ids, mask = prompt()
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        do_sample=False,
        num_beams=beams,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        disable_compile=True,
    )
    return out.tolist()


def ordinary(model: Any, length: int | None) -> Any:
    is_pair = model.config.is_encoder_decoder
    config = model.get_decoder().config if is_pair else model.config
    own = DynamicCache(config=config) if length is None else StaticCache(config, length)
    return EncoderDecoderCache(own, DynamicCache(config=config)) if is_pair else own


def kv_bytes(cache: Any) -> int:
    """Bytes of all distinct storages that hold keys or values."""
    caches = [cache]
    if isinstance(cache, EncoderDecoderCache):
        caches = [cache.self_attention_cache, cache.cross_attention_cache]
    tensors = (t for c in caches for layer in c.layers for t in (layer.keys, layer.values))
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None
    }
    return sum(storages.values())


ALL = itertools.product([*DEEP, "t5"], ["eager", "sdpa"], [None, 40], [1, 3])


def is_fast(name: str, attn: str, length: int | None, beams: int) -> bool:
    """Each kind of cache of each model, and one model with all else."""
    return (attn == "sdpa" and beams == 1) or (name == "llama" and length is None)


@pytest.mark.parametrize(("name", "attn", "length", "beams"), architectures.sampled_rows(ALL, is_fast))
def test_sharing_without_compilation(name: str, attn: str, length: int | None, beams: int) -> None:
    model = model_of(name, attn)
    full = ordinary(model, length)
    alone = generate(model, full, beams)
    cache = cache_for(model, plan_of(name, {1: 0, 3: 2}), max_cache_len=length)
    twin: Any = twin_of(model, share=2)
    if name == "t5":  # the plan is of the decoder: its encoder stays
        twin.encoder = model.encoder
    expected = generate(twin, ordinary(twin, length), beams)
    assert generate(model, cache, beams) == expected
    assert expected != alone
    assert kv_bytes(cache) * 2 == kv_bytes(full)
    assert int(cache.get_seq_length()) == int(full.get_seq_length())
    cache.reset()
    assert generate(model, cache, beams) == expected


def test_groups_of_three_and_a_rest() -> None:
    model = model_of("llama")
    cache = cache_for(model, plan_of("llama", {1: 0, 2: 0}))
    twin = twin_of(model, share=3)
    assert generate(model, cache) == generate(twin, ordinary(twin, None))


def test_prompt_lookup_crops_the_cache() -> None:
    model: Any = model_of("llama")
    ids = torch.randint(3, 100, (1, 12)).repeat(1, 2)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "prompt_lookup_num_tokens": 3}
    twin: Any = twin_of(model, share=2)
    expected = twin.generate(ids, **settings).tolist()
    assert (
        model.generate(
            ids, past_key_values=cache_for(model, plan_of("llama", {1: 0, 3: 2})), **settings
        ).tolist()
        == expected
    )


@pytest.mark.parametrize("length", [None, 40], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_each_layer_has_its_own_length_within_a_step(name: str, length: int | None) -> None:
    config = model_of(name).config
    names = {i: f"layer {i}" for i in range(4)}
    cache = build(config, set(), {1: 0, 3: 2}, names, length)
    usual = DynamicCache(config=config) if length is None else StaticCache(config, length)
    for new in (12, 1, 1):
        states = torch.randn(2, 2, new, 16)
        for index in range(4):
            before = [int(c.get_seq_length(index)) for c in (cache, usual)]
            given = [c.update(states, states, index)[0].shape for c in (cache, usual)]
            after = [int(c.get_seq_length(index)) for c in (cache, usual)]
            assert before[0] == before[1]
            assert given[0] == given[1]
            assert after[0] == after[1] == before[0] + new


@pytest.mark.parametrize("length", [None, 40], ids=["dynamic", "static"])
@pytest.mark.parametrize("absent", [{0}, {3}, {1, 2}, {0, 1}])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_absent_layers_have_the_lengths_of_a_kept_one(
    name: str, absent: set[int], length: int | None
) -> None:
    config = model_of(name).config
    cache = build(config, absent, {}, {i: f"layer {i}" for i in range(4)}, length)
    usual = DynamicCache(config=config) if length is None else StaticCache(config, length)
    kinds = {usual.layers[i].is_sliding for i in range(4) if i not in absent}
    for new in (5, 12, 1, 1):
        states = torch.randn(2, 2, new, 16)
        for index in range(4):
            if usual.layers[index].is_sliding in kinds:
                assert cache.is_sliding[index] == usual.is_sliding[index]
                assert cache.get_mask_sizes(new, index) == usual.get_mask_sizes(new, index)
            assert int(cache.get_seq_length(index)) == int(usual.get_seq_length(index))
        for index in range(4):
            given = usual.update(states, states, index)[0]
            if index not in absent:
                cache.update(states, states, index)
            elif usual.layers[index].is_sliding in kinds:
                assert cache.layers[index]._length(new) == given.shape[-2]
    assert [type(layer) is AbsentLayer for layer in cache.layers] == [i in absent for i in range(4)]
    cache.reset()
    assert int(cache.get_seq_length()) == 0


def test_absent_layer_that_is_run() -> None:
    model = model_of("llama")
    cache = cache_for(model, plan_of("llama", {}, absent={1}))
    with pytest.raises(RuntimeError, match=r"leaves out layer 1 \(model.layers.1\), but the model ran it"):
        generate(model, cache)


def test_absent_layer_that_is_compiled_and_run() -> None:
    model = model_of("llama")
    cache = cache_for(model, plan_of("llama", {}, absent={1}))
    model.forward = torch.compile(model.forward, backend="effopt", options={"lowering": "eager"})
    with pytest.raises(RuntimeError, match=r"leaves out layer 1 \(model.layers.1\), but the model ran it"):
        generate(model, cache)


def test_identity_plan_gives_an_ordinary_cache() -> None:
    model = model_of("llama")
    cache = cache_for(model, plan_of("llama", {}))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 4
    assert generate(model, cache) == generate(model, ordinary(model, None))


@pytest.mark.parametrize(
    ("model", "plan", "error", "message"),
    [
        ("llama", plan_of("gpt2", {1: 0}), PlanError, "no module 'transformer.h.0'"),
        ("llama", plan_of("llama", {1: 0}, count=2), PlanError, "it has 2 layers, the cache 4"),
        ("llama", plan_of("llama", {1: 0}, count=6), PlanError, "no module 'model.layers.4'"),
        ("gemma2", plan_of("gemma2", {2: 1}), PlanError, "caches of different kinds or windows"),
        ("llama", plan_of("llama", {}, absent={0, 1, 2, 3}), PlanError, "skips every layer"),
        ("llama", plan_of("llama", {1: 0, 2: 1}), PlanError, "keeps no keys and values"),
    ],
)
def test_plans_that_do_not_fit(model: str, plan: Plan, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cache_for(model_of(model), plan)


def test_plan_of_another_class_of_layer() -> None:
    model = model_of("llama")
    entries = tuple(Entry(f"model.layers.{i}", "MixtralDecoderLayer", None) for i in range(4))
    plan = Plan((Section("skip-layers", (PlannedStack(64, entries),)),))
    with pytest.raises(PlanError, match=r"'model\.layers\.0' is a LlamaDecoderLayer"):
        cache_for(model, plan)


@pytest.mark.parametrize("name", ["bert", "t5-encoder"])
def test_models_without_a_cache(name: str) -> None:
    model, _ = architectures.build(name)
    with pytest.raises(EffoptError, match="has no key-value cache"):
        cache_for(model, plan_of(name, {}))
    with pytest.raises(EffoptError, match="Sequential has no key-value cache"):
        cache_for(torch.nn.Sequential(), plan_of(name, {}))


def test_compiled_model_is_taken_as_the_model() -> None:
    model = model_of("llama")
    plan = plan_of("llama", {1: 0})
    assert len(cache_for(torch.compile(copy.deepcopy(model)), plan)) == len(cache_for(model, plan)) == 4


def test_transformers_is_imported_on_use_only() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, effopt.caches, effopt.errors\n"
        "try: effopt.caches.cache_for(torch.nn.Linear(1, 1), None)\n"
        "except effopt.errors.EffoptError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install transformers" in out.stdout
