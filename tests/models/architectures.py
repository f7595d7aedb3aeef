"""Small random models of `transformers` architectures, and inputs for them. Nothing is downloaded.

    model, inputs = build("llama", "sdpa")
    model(**inputs)

Hidden size 64, 2 layers, 4 heads, a vocabulary of 100: what the models share is in `_SHAPE`, and each
row of `ARCHITECTURES` adds what its configuration calls by another name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers


def sampled(names: Iterable[Any], *fast: Any) -> list[Any]:
    """All of them as parameters, but only `fast` ones in `make test`; `make sweep` runs the others."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def sampled_rows(rows: Iterable[tuple[Any, ...]], fast: Callable[..., bool]) -> list[Any]:
    """The same for several arguments at once: rows that `fast` is true of run in `make test`."""
    return [row if fast(*row) else pytest.param(*row, marks=pytest.mark.slow) for row in rows]


_SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GLU: dict[str, Any] = {"intermediate_size": 112}
_GROUPED: dict[str, Any] = {**_GLU, "num_key_value_heads": 2}
_HEAD: dict[str, Any] = {**_GROUPED, "head_dim": 16}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 112}
_MOE: dict[str, Any] = {**_HEAD, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
_NO_DROPOUT: tuple[str, ...] = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "emb_pdrop",
    "embedding_dropout",
    "activation_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "ffn_dropout",
    "resid_pdrop",
    "mlp_dropout",
    "layerdrop",
    "residual_dropout",
)


@dataclass(frozen=True)
class Architecture:
    """One row: the model class, its configuration class by `model_type`, and what differs from `_SHAPE`."""

    model_type: str
    head: str = "AutoModelForCausalLM"
    config: Mapping[str, Any] = field(default_factory=dict)
    attention_blocks: int = 2
    """Attention blocks of one forward pass."""


CAUSAL, ENCODER = "AutoModelForCausalLM", "AutoModel"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", CAUSAL, _GROUPED),
    "qwen3": Architecture("qwen3", CAUSAL, _HEAD),
    "gemma2": Architecture("gemma2", CAUSAL, {**_HEAD, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gpt2": Architecture("gpt2", CAUSAL, _GPT),
    "bert": Architecture("bert", ENCODER, _GLU),
    "t5-encoder": Architecture(
        "t5", "T5EncoderModel", {"d_model": 64, "d_kv": 16, "d_ff": 112, "num_layers": 2, "num_heads": 4}
    ),
    "opt": Architecture("opt", CAUSAL, {"ffn_dim": 112, "word_embed_proj_dim": 64}),
    "bloom": Architecture("bloom", CAUSAL, {"n_layer": 2, "n_head": 4}),
    "falcon": Architecture("falcon", CAUSAL),
    "mixtral": Architecture(
        "mixtral", CAUSAL, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "gpt-neox": Architecture("gpt_neox", CAUSAL, _GLU),
    "phi3": Architecture("phi3", CAUSAL, _GROUPED),
}
"""The twelve of the acceptance tests."""

_MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

MORE: dict[str, Architecture] = {
    "mistral": Architecture("mistral", CAUSAL, {**_HEAD, "sliding_window": 8}),
    "gemma": Architecture("gemma", CAUSAL, _HEAD),
    "gemma3": Architecture("gemma3_text", CAUSAL, {**_HEAD, "sliding_window": 8}),
    "qwen2": Architecture("qwen2", CAUSAL, _GROUPED),
    "qwen2-moe": Architecture("qwen2_moe", CAUSAL, {**_MOE, "shared_expert_intermediate_size": 48}),
    "qwen3-moe": Architecture("qwen3_moe", CAUSAL, _MOE),
    "phi": Architecture("phi", CAUSAL, _GLU),
    "stablelm": Architecture("stablelm", CAUSAL, _GROUPED),
    "starcoder2": Architecture("starcoder2", CAUSAL, _GROUPED),
    "olmo": Architecture("olmo", CAUSAL, _GROUPED),
    "olmo2": Architecture("olmo2", CAUSAL, _GROUPED),
    "olmo3": Architecture("olmo3", CAUSAL, {**_GROUPED, "sliding_window": 8}),
    "olmoe": Architecture("olmoe", CAUSAL, {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": Architecture("cohere", CAUSAL, _GROUPED),
    "cohere2": Architecture("cohere2", CAUSAL, {**_HEAD, "sliding_window": 8}),
    "granite": Architecture("granite", CAUSAL, _GROUPED),
    "granitemoe": Architecture(
        "granitemoe", CAUSAL, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "nemotron": Architecture("nemotron", CAUSAL, _HEAD),
    "persimmon": Architecture("persimmon", CAUSAL, _GLU),
    "smollm3": Architecture("smollm3", CAUSAL, _HEAD),
    "glm": Architecture("glm", CAUSAL, _HEAD),
    "glm4": Architecture("glm4", CAUSAL, _HEAD),
    "helium": Architecture("helium", CAUSAL, _HEAD),
    "exaone4": Architecture("exaone4", CAUSAL, {**_HEAD, "sliding_window": 8, "sliding_window_pattern": 2}),
    "gpt-oss": Architecture(
        "gpt_oss",
        CAUSAL,
        {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "gpt-neo": Architecture(
        "gpt_neo",
        CAUSAL,
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt-j": Architecture("gptj", CAUSAL, {**_GPT, "rotary_dim": 8}),
    "gpt-bigcode": Architecture("gpt_bigcode", CAUSAL, _GPT),
    "codegen": Architecture("codegen", CAUSAL, {**_GPT, "rotary_dim": 8}),
    "deepseek-v2": Architecture(
        "deepseek_v2",
        CAUSAL,
        {
            **_GROUPED,
            **_MLA,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek-v3": Architecture(
        "deepseek_v3",
        CAUSAL,
        {
            **_GROUPED,
            **_MLA,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "diffllama": Architecture("diffllama", CAUSAL, _HEAD, attention_blocks=4),
    "bamba": Architecture(
        "bamba",
        CAUSAL,
        {**_HEAD, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
        attention_blocks=1,
    ),
    "mamba": Architecture("mamba", CAUSAL, {"state_size": 8}, attention_blocks=0),
    "roberta": Architecture("roberta", ENCODER, {**_GLU, "max_position_embeddings": 66}),
    "distilbert": Architecture(
        "distilbert", ENCODER, {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 112}
    ),
    "albert": Architecture("albert", ENCODER, {**_GLU, "embedding_size": 32}),
    "electra": Architecture("electra", ENCODER, {**_GLU, "embedding_size": 32}),
    "mpnet": Architecture("mpnet", ENCODER, {**_GLU, "max_position_embeddings": 66}),
    "deberta-v2": Architecture(
        "deberta-v2", ENCODER, {**_GLU, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "modernbert": Architecture("modernbert", ENCODER, {**_GLU, "local_attention": 8}),
    "squeezebert": Architecture("squeezebert", ENCODER, {**_GLU, "embedding_size": 64}),
    "xglm": Architecture(
        "xglm", CAUSAL, {"d_model": 64, "ffn_dim": 112, "num_layers": 2, "attention_heads": 4}
    ),
    "xlm-roberta": Architecture("xlm-roberta", ENCODER, {**_GLU, "max_position_embeddings": 66}),
    "biogpt": Architecture("biogpt", CAUSAL, _GLU),
    "ernie": Architecture("ernie", ENCODER, _GLU),
    "convbert": Architecture("convbert", ENCODER, {**_GLU, "embedding_size": 64}),
    "roformer": Architecture("roformer", ENCODER, _GLU),
    "megatron-bert": Architecture("megatron-bert", ENCODER, _GLU),
    "fnet": Architecture("fnet", ENCODER, _GLU, attention_blocks=0),
    "apertus": Architecture("apertus", CAUSAL, _GROUPED),
    "arcee": Architecture("arcee", CAUSAL, _HEAD),
    "ernie4-5": Architecture("ernie4_5", CAUSAL, _HEAD),
    "seed-oss": Architecture("seed_oss", CAUSAL, _HEAD),
    "hunyuan": Architecture("hunyuan_v1_dense", CAUSAL, _HEAD),
    "lfm2": Architecture(
        "lfm2", CAUSAL, {**_GROUPED, "layer_types": ["conv", "full_attention"]}, attention_blocks=1
    ),
    "dots1": Architecture(
        "dots1",
        CAUSAL,
        {
            **_MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "minimax": Architecture(
        "minimax",
        CAUSAL,
        {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
}
"""For the sweep: whatever else can be built small."""


def build(
    name: str, attn: str = "sdpa", *, batch: int = 2, length: int = 12, **config: Any
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model in evaluation mode, without dropout and caches, and inputs for its forward pass.

    Args:
        name: a key of `ARCHITECTURES` or `MORE`.
        attn: `eager` or `sdpa`; an architecture without SDPA takes eager.
        batch: rows of `input_ids`.
        length: tokens in a row.
        config: configuration entries that override the row's.
    """
    row = ARCHITECTURES.get(name) or MORE[name]
    cfg = transformers.AutoConfig.for_model(row.model_type, **{**_SHAPE, **row.config, **config})
    cfg._attn_implementation = attn
    for entry in _NO_DROPOUT:
        if isinstance(getattr(cfg, entry, None), float):
            setattr(cfg, entry, 0.0)
    if "use_cache" not in config:
        cfg.use_cache = False
    torch.manual_seed(0)
    model_class = getattr(transformers, row.head)
    try:
        model = model_class.from_config(cfg) if row.head.startswith("Auto") else model_class(cfg)
    except ValueError as error:
        if attn != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        return build(name, "eager", batch=batch, length=length, **config)
    ids = torch.randint(3, cfg.vocab_size, (batch, length))
    return model.eval(), {"input_ids": ids}


def main_output(outputs: Any) -> torch.Tensor:
    """Logits of a model with a head, hidden states of one without."""
    logits = getattr(outputs, "logits", None)
    return logits if logits is not None else outputs.last_hidden_state
