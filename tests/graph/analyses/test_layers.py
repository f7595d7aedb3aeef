"""Layers are the modules of a model where it has them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from effopt.graph.analyses.layers import attention_of
from tests.graph.analyses.layer_cases import Seen, analysed, assert_agrees_with_modules, only, recorder
from tests.models.architectures import ARCHITECTURES, MORE, build, sampled, sampled_rows

CONTAINERS = {
    "gpt2": "transformer.h",
    "bert": "encoder.layer",
    "t5-encoder": "encoder.block",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
}


def is_fast(name: str, training: bool) -> bool:
    """Each of the twelve once."""
    return training == (name in ("llama", "bloom", "t5-encoder", "gpt-neox"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Bloom does
@pytest.mark.parametrize(
    ("name", "training"), sampled_rows(itertools.product(ARCHITECTURES, [False, True]), is_fast)
)
def test_architectures(name: str, training: bool) -> None:
    model, inputs = build(
        name, num_hidden_layers=3, **({"n_layer": 3} if "h" in CONTAINERS.get(name, "") else {})
    )
    container = CONTAINERS.get(name, "model.layers")
    count = len(model.get_submodule(container))
    with torch.set_grad_enabled(training):
        seen = assert_agrees_with_modules(model, inputs, [[f"{container}.{i}" for i in range(count)]])
    assert [len(attention_of(layer)) for layer in seen.found.found[0].layers] == [1] * count
    assert not seen.found.refused
    if name != "t5-encoder":  # its entry is the embedding itself, its config calls the depth otherwise
        assert count == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_architectures(name: str) -> None:
    # The other form of Mamba's recurrence calls torch.func.vmap, and capture refuses that.
    model, inputs = build(name, **({"use_associative_scan": False} if name == "mamba" else {}))
    with torch.no_grad():
        seen = only(analysed(model, **inputs))
    assert [len(stack) for stack in seen.paths] == [2]
    if name != "albert":  # one module, called twice
        assert all(path.endswith(f".{i}") or path == f"layers.{i}" for i, path in enumerate(seen.paths[0]))


def seq2seq(name: str) -> tuple[nn.Module, dict[str, Tensor], list[list[str]]]:
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(3, 100, (2, 12)), "decoder_input_ids": torch.randint(3, 100, (2, 7))}
    if name == "t5":
        config: Any = transformers.T5Config(
            vocab_size=100, d_model=64, d_kv=16, d_ff=112, num_layers=3, num_decoder_layers=2, num_heads=4,
            dropout_rate=0.0, use_cache=False, decoder_start_token_id=0,
        )  # fmt: skip
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
        return (
            model,
            ids,
            [[f"encoder.block.{i}" for i in range(3)], [f"decoder.block.{i}" for i in range(2)]],
        )
    config = transformers.BartConfig(
        vocab_size=100, d_model=64, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=112, decoder_ffn_dim=112, max_position_embeddings=64,
        dropout=0.0, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    paths = [[f"model.{part}.layers.{i}" for i in range(n)] for part, n in (("encoder", 3), ("decoder", 2))]
    return transformers.BartForConditionalGeneration(config), ids, paths


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_are_two_stacks(name: str) -> None:
    model, inputs, paths = seq2seq(name)
    with torch.no_grad():
        seen = assert_agrees_with_modules(model.eval(), inputs, paths)
    encoder, decoder = seen.found
    assert [len(attention_of(layer)) for layer in encoder.layers] == [1, 1, 1]
    assert [len(attention_of(layer)) for layer in decoder.layers] == [2, 2]


def test_images() -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 112}
    model = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=16, patch_size=8)).eval()
    with torch.no_grad():
        assert_agrees_with_modules(
            model, {"pixel_values": torch.randn(2, 3, 16, 16)}, [[f"layers.{i}" for i in range(3)]]
        )


def test_stages_of_differing_width_are_a_stack_each() -> None:
    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 32], depths=[2, 3], image_size=32, num_stages=2, patch_size=2
    )
    model = transformers.ConvNextModel(config).eval()
    paths = [[f"encoder.stages.{s}.layers.{i}" for i in range(n)] for s, n in ((0, 2), (1, 3))]
    with torch.no_grad():
        assert_agrees_with_modules(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, paths)


def test_a_block_that_projects_its_input_is_no_layer() -> None:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 3], layer_type="basic"
    )
    model = transformers.ResNetModel(config).eval()
    with torch.no_grad():
        seen = only(analysed(model, pixel_values=torch.randn(1, 3, 32, 32)))
    assert [p.rpartition("stages.")[2] for stack in seen.paths for p in stack] == [
        "0.layers.0", "0.layers.1", "1.layers.1", "1.layers.2",
    ]  # fmt: skip
    ((_, reason),) = seen.found.refused
    assert "stages.1.layers.0 does not carry on what it reads" in reason


def test_dynamic_sizes() -> None:
    model, inputs = build("llama", num_hidden_layers=3)
    with torch.no_grad():
        assert_agrees_with_modules(model, inputs, [[f"model.layers.{i}" for i in range(3)]], dynamic=True)


@pytest.mark.parametrize("cache", sampled(["dynamic", "static"], "static"))
@pytest.mark.parametrize("name", sampled(["llama", "gpt2", "gemma2"], "gpt2"))
def test_prefill_and_decode_have_the_same_layers(name: str, cache: str) -> None:
    model, inputs = build(name, use_cache=True)
    graphs: list[Seen] = []
    model.forward = torch.compile(model.forward, backend=recorder(graphs, False))
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    model.generate(
        inputs["input_ids"],
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        disable_compile=True,
        **extra,
    )
    seen = [g for g in graphs if g.found.found]
    assert len(seen) >= 2
    container = CONTAINERS.get(name, "model.layers")
    for graph in seen:
        only([graph])
        assert graph.paths == [[f"{container}.0", f"{container}.1"]]
        assert [len(attention_of(layer)) for layer in graph.found.found[0].layers] == [1, 1]
