"""The chunks of Mamba-2 and its relatives in `transformers` become one call a layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from effopt.compile import record
from tests.passes.conftest import run_compiled

SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
MIXER = {
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": {**SIZES, "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "bamba": {**SIZES, **HEADS, **MIXER, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **SIZES, **HEADS, **MIXER, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": {**SIZES, **HEADS, **MIXER, "mamba_n_groups": 1, "mamba_d_ssm": 64, "head_dim": 8},
    "zamba2": {
        **SIZES, **HEADS, "mamba_d_state": 4, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1,
        "chunk_size": 8, "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 4, "num_mem_blocks": 1,
        "use_mem_rope": False,
    },
    "nemotron_h": {
        "vocab_size": 32, "hidden_size": 32, **HEADS, "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 4, "n_groups": 2, "chunk_size": 8, "head_dim": 8,
        "layers_block_type": ["mamba", "attention"],
    },
}  # fmt: skip
MIXERS = {"mamba2": 2, "bamba": 1, "granitemoehybrid": 1, "falcon_h1": 2, "zamba2": 2, "nemotron_h": 1}
CHEAP = ("mamba2", "bamba")
ONE_LAYER = {"mamba2": {"num_hidden_layers": 1}}


def model_of(name: str, **sizes: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(CONFIGS[name] | sizes))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("A_log", "dt_bias")):
            torch.nn.init.uniform_(parameter, -1.0, 1.0)
    return model


def recognised(report: Any) -> int:
    return int(report.counts["recognize-chunked-attention"])


def in_float64(model: Any, tokens: Tensor, patch: pytest.MonkeyPatch) -> Tensor:
    """Logits of eager mode, whose `float()` in the mixers is float64 too; the norms stay in float32."""
    with patch.context() as patched, torch.no_grad():
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        wanted: Tensor = copy.deepcopy(model).double()(tokens, use_cache=False).logits
    assert wanted.dtype == torch.float64
    return wanted


def assert_near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize(
    "name", [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_every_mixer_is_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirteen tokens, which are a chunk and a part of one."""
    model, tokens = model_of(name), torch.randint(0, 32, (2, 13))
    with torch.no_grad():
        out, report = run_compiled(lambda x: model(x, use_cache=False).logits, tokens)
    wanted = in_float64(model, tokens, monkeypatch)
    assert_near(out.double(), wanted)
    assert recognised(report) == MIXERS[name], report.rejected


def test_a_prompt_and_what_follows() -> None:
    """The state that a prompt leaves is that of eager mode, and is what the next tokens are read with."""
    model, tokens = model_of("mamba2"), torch.randint(0, 32, (2, 15))
    compiled = torch.compile(model, backend="effopt", options={"lowering": "eager"})
    with torch.no_grad(), record() as report:
        out, wanted = (f(tokens[:, :13], use_cache=True) for f in (compiled, model))
        assert recognised(report) == 2, report.rejected
        assert_near(out.logits, wanted.logits)
        for layer in range(2):
            pairs = (x.cache_params.get_recurrent_state(layer) for x in (out, wanted))
            assert_near(*pairs)
        for i in (13, 14):
            both = ((compiled, out.cache_params), (model, wanted.cache_params))
            step = tokens[:, i : i + 1]
            out, wanted = (f(step, cache_params=cache, use_cache=True) for f, cache in both)
            assert_near(out.logits, wanted.logits)
        whole = model(tokens, use_cache=False).logits
        assert_near(out.logits[:, -1], whole[:, -1])


@pytest.mark.parametrize(
    "name", ["mamba2", *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n != "mamba2")]
)
def test_a_prompt_in_two_parts(name: str) -> None:
    """The second part starts from the state of the first, as in eager mode."""
    model, tokens = model_of(name), torch.randint(0, 32, (2, 22))
    compiled = torch.compile(model, backend="effopt", options={"lowering": "eager"}, dynamic=False)
    cache = "cache_params" if name == "mamba2" else "past_key_values"

    def in_parts(call: Any) -> tuple[Tensor, Tensor]:
        first = call(tokens[:, :13], use_cache=True)
        second = call(tokens[:, 13:], **{cache: first[cache]}, use_cache=True)
        return first.logits, second.logits

    with torch.no_grad(), record() as report:
        out, wanted = in_parts(compiled), in_parts(model)
        whole = model(tokens, use_cache=False).logits
    assert recognised(report) == 2 * MIXERS[name], report.rejected
    for pair in zip(out, wanted, strict=True):
        assert_near(*pair)
    if name != "bamba":  # whose parts differ from the whole in eager mode too (transformers 5.23)
        assert_near(out[1], whole[:, 13:])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lowering"), [("mamba2", "auto"), *((name, "eager") for name in CONFIGS)])
def test_gradients(name: str, lowering: str) -> None:
    model, tokens = model_of(name, **ONE_LAYER.get(name, {})), torch.randint(0, 32, (2, 13))
    parameters = list(model.parameters())
    out, report = run_compiled(lambda x: model(x, use_cache=False).logits, tokens, lowering=lowering)
    assert recognised(report) == (1 if name in ONE_LAYER else MIXERS[name]), report.rejected
    logits = (out, model(tokens, use_cache=False).logits)
    found = (torch.autograd.grad(x.square().sum(), parameters, allow_unused=True) for x in logits)
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
