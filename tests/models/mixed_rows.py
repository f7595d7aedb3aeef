"""Models of several inputs, of time series and proteins, and texts that are read unusually; see `row.py`."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.row import TEXT, VISION, Inputs, Row, boxes, ids, image, image_and_tokens, tokens

_BOTH: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION}
_SERIES: dict[str, Any] = {
    "prediction_length": 4,
    "context_length": 12,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_FUNNEL: dict[str, Any] = {
    "vocab_size": 100,
    "block_sizes": [1, 1],
    "num_decoder_layers": 1,
    "d_model": 64,
    "n_head": 4,
    "d_head": 16,
    "d_inner": 112,
}


def series() -> Inputs:
    return {
        "past_values": torch.rand(2, 14),
        "past_time_features": torch.rand(2, 14, 1),
        "past_observed_mask": torch.ones(2, 14),
        "future_values": torch.rand(2, 4),
        "future_time_features": torch.rand(2, 4, 1),
    }


def steps() -> Inputs:
    return {
        "states": torch.randn(2, 4, 5),
        "actions": torch.randn(2, 4, 3),
        "rewards": torch.randn(2, 4, 1),
        "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4).long(),
    }


ROWS: dict[str, Row] = {
    "clip": Row("clip", {**_BOTH, "projection_dim": 32}, image_and_tokens, attention_blocks=4),
    "siglip": Row("siglip", _BOTH, image_and_tokens, attention_blocks=5),
    "owlvit": Row("owlvit", {**_BOTH, "projection_dim": 32}, image_and_tokens, attention_blocks=4),
    "blip": Row(
        "blip",
        {"text_config": {**TEXT, "encoder_hidden_size": 64}, "vision_config": VISION},
        image_and_tokens,
        "BlipForImageTextRetrieval",
        attention_blocks=6,
    ),
    "blip2-qformer": Row(
        "blip_2_qformer",
        {**TEXT, "encoder_hidden_size": 64, "cross_attention_frequency": 2},
        lambda: {"query_embeds": torch.randn(2, 5, 64), "encoder_hidden_states": torch.randn(2, 17, 64)},
        "blip_2.modeling_blip_2.Blip2QFormerModel",
        attention_blocks=3,
    ),
    "groupvit": Row(
        "groupvit",
        {
            "text_config": TEXT,
            "vision_config": {
                **VISION,
                "depths": [1, 1, 1],
                "num_group_tokens": [8, 4, 0],
                "num_output_groups": [8, 4, 0],
            },
            "projection_dim": 32,
            "projection_intermediate_dim": 48,
        },
        image_and_tokens,
        attention_blocks=9,
        left=2,
    ),
    "git": Row(
        "git", {**TEXT, "vision_config": VISION}, image_and_tokens, "AutoModelForCausalLM", attention_blocks=4
    ),
    "flava": Row(
        "flava",
        {
            "text_config": TEXT,
            "image_config": VISION,
            "multimodal_config": {k: v for k, v in VISION.items() if not k.endswith("_size")}
            | {"hidden_size": 64, "intermediate_size": 112},
            "hidden_size": 64,
            "projection_dim": 32,
        },
        image_and_tokens,
        attention_blocks=6,
    ),
    "bridgetower": Row(
        "bridgetower",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "text_config": TEXT,
            "vision_config": {k: v for k, v in VISION.items() if k != "intermediate_size"},
        },
        lambda: {**image_and_tokens(), "pixel_mask": torch.ones(2, 32, 32).long()},
        attention_blocks=12,
        left=4,
    ),
    "lxmert": Row(
        "lxmert",
        {**TEXT, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 32, "visual_pos_dim": 4},
        lambda: {**tokens(), "visual_feats": torch.randn(2, 6, 32), "visual_pos": torch.rand(2, 6, 4)},
        attention_blocks=6,
    ),
    "visual-bert": Row(
        "visual_bert",
        {**TEXT, "visual_embedding_dim": 32},
        lambda: {
            **tokens(),
            "visual_embeds": torch.randn(2, 6, 32),
            "visual_attention_mask": torch.ones(2, 6),
            "visual_token_type_ids": torch.ones(2, 6).long(),
        },
    ),
    "layoutlm": Row(
        "layoutlm", {**TEXT, "max_2d_position_embeddings": 64}, lambda: {**tokens(), "bbox": boxes()}
    ),
    "layoutlmv3": Row(
        "layoutlmv3",
        {
            **TEXT,
            "input_size": 32,
            "patch_size": 8,
            "coordinate_size": 11,
            "shape_size": 10,
            "rel_pos_bins": 8,
            "rel_2d_pos_bins": 8,
        },
        lambda: {**tokens(), "bbox": boxes(), **image()},
    ),
    "lilt": Row(
        "lilt",
        {**TEXT, "hidden_size": 48, "channel_shrink_ratio": 4},
        lambda: {**tokens(), "bbox": boxes()},
        attention_blocks=4,
        left=3,
    ),
    "tapas": Row(
        "tapas",
        {**TEXT, "type_vocab_sizes": [3, 16, 16, 2, 2, 10, 10]},
        lambda: {**tokens(), "token_type_ids": torch.zeros(2, 12, 7).long()},
    ),
    "perceiver": Row(
        "perceiver",
        {
            "num_latents": 8,
            "d_latents": 64,
            "d_model": 32,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 2,
        },
        lambda: {"inputs": torch.randn(2, 12, 32)},
        attention_blocks=3,
    ),
    "time-series-transformer": Row("time_series_transformer", _SERIES, series, attention_blocks=6),
    "informer": Row("informer", {**_SERIES, "sampling_factor": 2}, series, attention_blocks=6),
    "autoformer": Row(
        "autoformer", {**_SERIES, "label_length": 4, "moving_average": 5}, series, attention_blocks=0
    ),
    "patchtst": Row(
        "patchtst",
        {
            "num_input_channels": 2,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "num_hidden_layers": 2,
            "d_model": 64,
            "num_attention_heads": 4,
            "ffn_dim": 112,
        },
        lambda: {"past_values": torch.randn(2, 32, 2)},
    ),
    "decision-transformer": Row(
        "decision_transformer",
        {"state_dim": 5, "act_dim": 3, "hidden_size": 64, "n_layer": 2, "n_head": 4, "n_inner": 112},
        steps,
    ),
    "esm": Row(
        "esm",
        {
            **TEXT,
            "vocab_size": 33,
            "mask_token_id": 32,
            "pad_token_id": 1,
            "position_embedding_type": "rotary",
        },
        lambda: {"input_ids": ids(most=31)},
    ),
    "funnel": Row("funnel", _FUNNEL, tokens, "FunnelModel", attention_blocks=3),
    "xlnet": Row(
        "xlnet", {"vocab_size": 100, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 112}, tokens
    ),
    "xlm": Row("xlm", {"vocab_size": 100, "emb_dim": 64, "n_layers": 2, "n_heads": 4}, tokens),
    "canine": Row(
        "canine",
        {**TEXT, "num_hash_buckets": 64, "local_transformer_stride": 16},
        lambda: {"input_ids": ids(32)},
        attention_blocks=5,
    ),
    "imagegpt": Row("imagegpt", {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4}, tokens),
    "longformer": Row(
        "longformer", {**TEXT, "attention_window": [8, 8]}, lambda: {"input_ids": ids(16)}, left=2
    ),
    "luke": Row(
        "luke",
        {**TEXT, "entity_vocab_size": 20, "entity_emb_size": 32},
        lambda: {
            **tokens(),
            "entity_ids": torch.randint(1, 20, (2, 3)),
            "entity_position_ids": torch.tensor([[[1, 2, -1], [3, -1, -1], [4, 5, 6]]]).repeat(2, 1, 1),
            "entity_attention_mask": torch.ones(2, 3).long(),
        },
        left=2,
    ),
}
