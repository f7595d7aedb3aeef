"""The recall model: its configuration, the trained checkpoint beside this file, and what judges it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tiny_lm"))

import model as tiny
import sequences
from transformers import LlamaConfig, LlamaForCausalLM

CHECKPOINT = Path(__file__).parent / "checkpoint"


def config() -> LlamaConfig:
    """Four layers of eight query heads and four KV heads of 16: 0.67 M parameters."""
    return LlamaConfig(
        vocab_size=sequences.VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=sequences.LENGTH,
        tie_word_embeddings=False,
        bos_token_id=sequences.BEGIN,
        eos_token_id=sequences.BEGIN,
        use_cache=False,
    )


def load(attention: str = "sdpa") -> LlamaForCausalLM:
    """The trained model, float32, in evaluation mode. Raises tiny.CheckpointError as `tiny.load` does."""
    return tiny.load(CHECKPOINT, attention=attention)


def language_model() -> tuple[Any, list[Any], list[Any]]:
    """For `effopt bench quality examples/recall_lm/recall_model.py:language_model`, and other judges."""
    return load(), sequences.texts(24), sequences.probes(64)
