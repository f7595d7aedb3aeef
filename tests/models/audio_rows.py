"""Models of sound, small; see `row.py`."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.row import ENCODER_DECODER, VISION, Inputs, Row, ids, wave

_WAVE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "vocab_size": 32,
}


def frames() -> Inputs:
    return {"input_features": torch.randn(2, 24, 32)}


def spectrum() -> Inputs:
    return {"input_features": torch.randn(2, 16, 40)}


ROWS: dict[str, Row] = {
    "wav2vec2": Row("wav2vec2", _WAVE, wave),
    "hubert": Row("hubert", _WAVE, wave),
    "wavlm": Row("wavlm", {**_WAVE, "num_buckets": 16, "max_bucket_distance": 40}, wave),
    "unispeech": Row("unispeech", _WAVE, wave),
    "sew": Row("sew", _WAVE, wave),
    "sew-d": Row("sew-d", _WAVE, wave),
    "data2vec-audio": Row(
        "data2vec-audio", {**_WAVE, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}, wave
    ),
    "wav2vec2-conformer": Row("wav2vec2-conformer", {**_WAVE, "position_embeddings_type": "relative"}, wave),
    "wav2vec2-bert": Row("wav2vec2-bert", {**_WAVE, "feature_projection_input_dim": 32}, frames),
    "seamless-m4t-speech": Row(
        "seamless_m4t",
        {
            "hidden_size": 64,
            "speech_encoder_layers": 2,
            "speech_encoder_attention_heads": 4,
            "speech_encoder_intermediate_size": 112,
            "feature_projection_input_dim": 32,
            "num_adapter_layers": 1,
            "adaptor_kernel_size": 3,
            "adaptor_stride": 2,
        },
        frames,
        "seamless_m4t.modeling_seamless_m4t.SeamlessM4TSpeechEncoder",
        attention_blocks=3,
    ),
    "parakeet": Row(
        "parakeet_encoder",
        {**_WAVE, "subsampling_conv_channels": 16, "num_mel_bins": 16},
        lambda: {"input_features": torch.randn(2, 64, 16)},
        "parakeet.modeling_parakeet.ParakeetEncoder",
    ),
    "audio-spectrogram-transformer": Row(
        "audio-spectrogram-transformer",
        {**VISION, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": torch.randn(2, 32, 16)},
    ),
    "clap": Row(
        "clap",
        {
            "audio_config": {
                "spec_size": 64,
                "window_size": 4,
                "num_mel_bins": 16,
                "patch_size": 4,
                "patch_stride": [4, 4],
                "hidden_size": 32,
                "patch_embeds_hidden_size": 16,
                "depths": [2, 2],
                "num_attention_heads": [2, 4],
                "enable_fusion": False,
                "projection_dim": 32,
            }
        },
        lambda: {"input_features": torch.randn(2, 1, 256, 16), "is_longer": torch.zeros(2, 1).bool()},
        "clap.modeling_clap.ClapAudioModel",
        attention_blocks=4,
        part="audio_config",
    ),
    "whisper": Row(
        "whisper",
        {**ENCODER_DECODER, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
        lambda: {**spectrum(), "decoder_input_ids": ids(7)},
        attention_blocks=6,
    ),
    "moonshine": Row(
        "moonshine",
        {
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 112,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        lambda: {"input_values": torch.randn(2, 8000), "decoder_input_ids": ids(7)},
        attention_blocks=6,
    ),
    "speecht5": Row(
        "speecht5",
        {**_WAVE, **ENCODER_DECODER, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
        lambda: {**wave(), "decoder_input_ids": ids(7)},
        "SpeechT5ForSpeechToText",
        attention_blocks=6,
    ),
    "speech-to-text": Row(
        "speech_to_text",
        {
            **ENCODER_DECODER,
            "input_feat_per_channel": 16,
            "num_conv_layers": 2,
            "conv_kernel_sizes": (3, 3),
            "conv_channels": 32,
            "max_source_positions": 64,
            "max_target_positions": 32,
        },
        lambda: {"input_features": torch.randn(2, 40, 16), "decoder_input_ids": ids(7)},
        attention_blocks=6,
    ),
    "musicgen": Row(
        "musicgen_decoder",
        {
            "vocab_size": 64,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 112,
            "num_codebooks": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 60,
            "bos_token_id": 60,
        },
        lambda: {
            "input_ids": torch.randint(0, 60, (4, 9)),
            "encoder_hidden_states": torch.randn(2, 6, 64),
        },
        "musicgen.modeling_musicgen.MusicgenForCausalLM",
        attention_blocks=4,
    ),
    "vits": Row(
        "vits",
        {
            "vocab_size": 100,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 96,
            "flow_size": 64,
        },
        lambda: {"input_ids": ids(9), "padding_mask": torch.ones(2, 9, 1)},
        "vits.modeling_vits.VitsTextEncoder",
        left=2,
    ),
}
