"""Greedy `generate` with a compiled forward: eager's tokens, Inductor's graphs, no copied caches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effopt.compile import effopt, record
from tests.models.architectures import build, sampled, sampled_rows

# Bloom instantiates its autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

MODELS = ("llama", "gpt2", "qwen3", "mixtral", "gemma2", "opt", "bloom", "falcon", "gpt-neox", "phi3")


def tokens(model: torch.nn.Module, ids: torch.Tensor, cache: str) -> torch.Tensor:
    """Twelve greedy tokens. `generate` is kept from compiling anything itself."""
    extra: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=12,
        disable_compile=True,
        **extra,
    )


def compiled_tokens(name: str, cache: str, backend: Callable[..., Any], **settings: Any) -> torch.Tensor:
    torch._dynamo.reset()
    model, inputs = build(name, "sdpa", use_cache=True)
    model.forward = torch.compile(model.forward, backend=backend, **settings)
    return tokens(model, inputs["input_ids"], cache)


def graphs_of_dynamo(name: str, cache: str) -> int:
    """What Dynamo gives any backend, Inductor among them."""
    count = 0

    def counting(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return module.forward

    compiled_tokens(name, cache, counting)
    return count


FAST = {("llama", "dynamic"), ("llama", "static"), ("gemma2", "static"), ("bloom", "dynamic")}


@pytest.mark.parametrize(
    ("name", "cache"),
    sampled_rows(itertools.product(MODELS, ["dynamic", "static"]), lambda *row: row in FAST),
)
def test_tokens_and_graphs(name: str, cache: str) -> None:
    model, inputs = build(name, "sdpa", use_cache=True)
    expected = tokens(model, inputs["input_ids"], cache)
    with record() as report:
        got = compiled_tokens(name, cache, effopt, options={"lowering": "eager"})
    assert got.tolist() == expected.tolist()
    assert not [g.refused for g in report.graphs if g.refused]
    assert 0 < len(report.graphs) <= graphs_of_dynamo(name, cache)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_through_inductor(name: str, cache: str) -> None:
    model, inputs = build(name, "sdpa", use_cache=True)
    expected = tokens(model, inputs["input_ids"], cache)
    assert compiled_tokens(name, cache, effopt).tolist() == expected.tolist()


def test_a_block_that_splits_its_projection_through_inductor() -> None:
    """GPT-NeoX keeps a third of a projection; what is around it in memory must not be overwritten."""
    torch._dynamo.reset()
    model, inputs = build("gpt-neox", "sdpa", use_cache=True)
    with torch.no_grad():
        expected = model(**inputs).logits
        got = torch.compile(model, backend=effopt)(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def encoder_decoder() -> tuple[torch.nn.Module, torch.Tensor]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=112,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
        initializer_factor=8.0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config).eval(), torch.randint(3, 100, (2, 12))


def encoder_decoder_tokens(cache: str, **settings: Any) -> tuple[Any, Any]:
    """Tokens of eager, and with encoder and decoder compiled."""
    torch._dynamo.reset()
    model, ids = encoder_decoder()
    expected = tokens(model, ids, cache)
    for part in (model.encoder, model.decoder):
        part.forward = torch.compile(part.forward, backend=effopt, **settings)
    return tokens(model, ids, cache).tolist(), expected.tolist()


@pytest.mark.parametrize("cache", sampled(["dynamic", "static"], "dynamic"))
def test_encoder_decoder_tokens(cache: str) -> None:
    got, expected = encoder_decoder_tokens(cache, options={"lowering": "eager"})
    assert got == expected
    assert len(set(expected[0])) > 3


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_encoder_decoder_tokens_through_inductor(cache: str) -> None:
    got, expected = encoder_decoder_tokens(cache)
    assert got == expected


class Allocated(TorchDispatchMode):
    """Bytes of every result that is not an operand or a view of one: what the ops of a call write anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        memory = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(args) if is_tensor(t)}
        for out in torch.utils._pytree.tree_leaves(result):
            if is_tensor(out) and out.untyped_storage()._cdata not in memory:
                self.bytes += out.untyped_storage().nbytes()
                self.largest = max(self.largest, out.untyped_storage().nbytes())
        return result


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def decode_bytes(length: int, run: Callable[[Callable[..., Any]], Callable[..., Any]]) -> tuple[int, int]:
    """(bytes written anew, bytes copied over old memory) by one decode step with a cache of `length`."""
    torch._dynamo.reset()
    written = 0
    caches = [torch.zeros(1, 2, length, 16) for _ in range(4)]

    def step(x: torch.Tensor, at: torch.Tensor, *held: torch.Tensor) -> torch.Tensor:
        for cache in held:
            cache.index_copy_(2, at, x)
            x = x + cache[:, :, :8].sum(2, keepdim=True)
        return x

    compiled = run(step)
    x, at = torch.randn(1, 2, 1, 16), torch.tensor([3])
    with torch.no_grad():
        compiled(x, at, *caches)
        with Allocated() as allocated, Copied() as copied:
            compiled(x, at, *caches)
    written = copied.bytes
    return allocated.bytes, written


class Copied(TorchDispatchMode):
    """Bytes that `copy_` writes over old memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def test_decode_step_writes_its_row_only() -> None:
    """Without Inductor: the bytes of a step are the same for a cache sixteen times as long."""

    def compile_(step: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(step, backend=effopt, options={"lowering": "eager"}, dynamic=False)

    short, long = decode_bytes(64, compile_), decode_bytes(1024, compile_)
    assert short == long
    assert long[0] < 1024 * 16 * 4


def static_decode_step(length: int, **settings: Any) -> tuple[Callable[[], Any], list[torch.Tensor]]:
    """One decode step of a Llama with a static cache of `length`, and the caches."""
    from transformers import StaticCache

    torch._dynamo.reset()
    model, inputs = build("llama", "sdpa", use_cache=True, max_position_embeddings=2048)
    cache = StaticCache(config=model.config, max_cache_len=length)
    model.forward = torch.compile(model.forward, backend=effopt, **settings)
    state = {"position": inputs["input_ids"].shape[1]}

    def step() -> Any:
        at = torch.tensor([[state["position"]]])
        with torch.no_grad():
            out = model(inputs["input_ids"][:1, :1], position_ids=at, past_key_values=cache, use_cache=True)
        state["position"] += 1
        return out.logits

    with torch.no_grad():
        model(inputs["input_ids"][:1], past_key_values=cache, use_cache=True)
    step()
    return step, [t for layer in cache.layers for t in (layer.keys, layer.values)]


def test_llama_decode_step_does_not_copy_its_caches() -> None:
    def measure(length: int) -> int:
        step, _ = static_decode_step(length, options={"lowering": "eager", "pipeline": ""}, dynamic=False)
        with Copied() as copied, Allocated() as allocated:
            step()
        assert copied.bytes < 4096
        return allocated.bytes

    short, long = measure(64), measure(512)
    cache_bytes = 2 * 16 * 4  # of one position: heads, head size, float32
    # Masks grow with the length; no cache of either layer, key or value, may be among what is made anew.
    assert long - short < (512 - 64) * cache_bytes


@pytest.mark.slow
def test_inductor_code_writes_caches_in_place() -> None:
    """Inductor's buffers, besides the caches that it is given, stay small whatever the cache's length."""
    from torch._inductor.utils import run_and_get_code

    length = 640  # a number that nothing else in the graph has
    step, _ = static_decode_step(length, dynamic=False)
    torch._dynamo.reset()
    _, sources = run_and_get_code(step)
    made = [line for source in sources for line in source.splitlines() if "= empty_strided" in line]
    whole = [line for line in made if f"(1, 2, {length}, 16)" in line]
    assert made
    assert not whole, whole
