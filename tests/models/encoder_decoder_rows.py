"""Models of an encoder and a decoder over text, which attends to it; small; see `row.py`."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.row import ENCODER_DECODER, TEXT, Row, tokens, two_texts

_T5: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 112,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_GEMMA: dict[str, Any] = {
    **TEXT,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
}


def _row(
    model_type: str, config: Any = ENCODER_DECODER, *, blocks: int = 6, left: int = 0, **more: Any
) -> Row:
    """Two layers with a self-attention each, and two with two attentions each, unless it is said."""
    return Row(model_type, {**config, **more}, two_texts, "AutoModelForSeq2SeqLM", blocks, left)


ROWS: dict[str, Row] = {
    "t5": _row("t5", _T5),
    "umt5": _row("umt5", _T5),
    "mt5": _row("mt5", _T5),
    "longt5": _row("longt5", _T5, left=6, local_radius=3, encoder_attention_type="local"),
    "t5gemma": _row("t5gemma", {"encoder": _GEMMA, "decoder": {**_GEMMA, "cross_attention_hidden_size": 64}}),
    "bart": _row("bart"),
    "mbart": _row("mbart"),
    "plbart": _row("plbart"),
    "pegasus": _row("pegasus"),
    "pegasus-x": _row("pegasus_x", blocks=8, left=3, block_size=8, num_global_tokens=4),
    "led": _row(
        "led",
        left=2,
        attention_window=8,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "marian": _row("marian", decoder_vocab_size=100),
    "m2m-100": _row("m2m_100"),
    "blenderbot": _row("blenderbot"),
    "bigbird-pegasus": _row("bigbird_pegasus", attention_type="original_full"),
    "prophetnet": _row(
        "prophetnet",
        {
            "vocab_size": 100,
            "hidden_size": 64,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 112,
            "decoder_ffn_dim": 112,
            "max_position_embeddings": 64,
            "ngram": 2,
            "num_buckets": 16,
            "relative_max_distance": 32,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
        blocks=8,
    ),
    "trocr": Row(
        "trocr",
        {
            "vocab_size": 100,
            "d_model": 64,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 112,
            "max_position_embeddings": 64,
        },
        lambda: {**tokens(), "encoder_hidden_states": torch.randn(2, 9, 64)},
        "AutoModelForCausalLM",
        attention_blocks=4,
    ),
}
