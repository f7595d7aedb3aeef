"""Models of images and videos, small; see `row.py`."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.row import BOTH_STACKS, VISION, Row, image, large_image, video

_SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}
_PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [32, 64],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}
_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "basic",
}
_DETR: dict[str, Any] = {
    **BOTH_STACKS,
    "num_queries": 6,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {**_RESNET, "out_features": ["stage2"]},
}
_FRAMES: dict[str, Any] = {**VISION, "num_frames": 4}

ROWS: dict[str, Row] = {
    "vit": Row("vit", VISION, image),
    "deit": Row("deit", VISION, image),
    "beit": Row("beit", {**VISION, "use_relative_position_bias": True}, image),
    "data2vec-vision": Row("data2vec-vision", {**VISION, "use_relative_position_bias": True}, image),
    "swin": Row("swin", _SWIN, image, attention_blocks=4),
    "swinv2": Row("swinv2", _SWIN, image, attention_blocks=4),
    "swin2sr": Row(
        "swin2sr",
        {**_SWIN, "image_size": 16, "patch_size": 1, "depths": (2,), "num_heads": (2,)},
        lambda: image(16),
    ),
    "maskformer-swin": Row(
        "maskformer-swin",
        _SWIN,
        image,
        "maskformer.modeling_maskformer_swin.MaskFormerSwinModel",
        attention_blocks=4,
    ),
    "dinov2": Row("dinov2", {**VISION, "mlp_ratio": 2}, image),
    "dinov2-registers": Row("dinov2_with_registers", {**VISION, "mlp_ratio": 2}, image),
    "dinov3": Row("dinov3_vit", VISION, image),
    "clip-vision": Row("clip_vision_model", VISION, image, "CLIPVisionModel"),
    "siglip-vision": Row("siglip_vision_model", VISION, image, "SiglipVisionModel", attention_blocks=3),
    "idefics3-vision": Row(
        "idefics3",
        {"vision_config": VISION},
        image,
        "idefics3.modeling_idefics3.Idefics3VisionTransformer",
        part="vision_config",
    ),
    "convnext": Row(
        "convnext",
        {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "image_size": 32},
        image,
        attention_blocks=0,
    ),
    "segformer": Row("segformer", _PYRAMID, image),
    "pvt-v2": Row("pvt_v2", _PYRAMID, image),
    "mobilevit": Row(
        "mobilevit",
        {
            "image_size": 64,
            "hidden_sizes": [32, 32, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 32, 32, 64],
            "num_attention_heads": 4,
        },
        large_image,
        attention_blocks=9,
    ),
    "levit": Row(
        "levit",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        large_image,
        attention_blocks=5,
    ),
    "cvt": Row(
        "cvt",
        {
            "embed_dim": [16, 32],
            "num_heads": [1, 2],
            "depth": [1, 2],
            "patch_sizes": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [2, 1],
            "mlp_ratio": [2.0, 2.0],
            "attention_drop_rate": [0.0, 0.0],
            "drop_rate": [0.0, 0.0],
            "drop_path_rate": [0.0, 0.0],
            "qkv_bias": [True, True],
            "cls_token": [False, True],
            "qkv_projection_method": ["dw_bn", "dw_bn"],
            "kernel_qkv": [3, 3],
            "padding_kv": [1, 1],
            "stride_kv": [2, 2],
            "padding_q": [1, 1],
            "stride_q": [1, 1],
        },
        image,
        attention_blocks=3,
    ),
    "vit-mae": Row(
        "vit_mae",
        {
            **VISION,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 48,
        },
        lambda: {**image(), "noise": torch.rand(2, 16)},
        "ViTMAEForPreTraining",
        attention_blocks=4,
    ),
    "yolos": Row("yolos", {**VISION, "image_size": [32, 32], "num_detection_tokens": 5}, image),
    "detr": Row("detr", _DETR, image, attention_blocks=6),
    "conditional-detr": Row("conditional_detr", _DETR, image, attention_blocks=6),
    "deformable-detr": Row(
        "deformable_detr",
        {
            **_DETR,
            "num_feature_levels": 2,
            "backbone_config": {**_RESNET, "out_features": ["stage1", "stage2"]},
        },
        large_image,
    ),
    "dpt": Row(
        "dpt",
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 16, 16],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
        image,
        "DPTForDepthEstimation",
        attention_blocks=4,
    ),
    "sam": Row(
        "sam",
        {
            "vision_config": {
                **VISION,
                "image_size": 64,
                "output_channels": 16,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 112,
                "num_pos_feats": 8,
            },
            "prompt_encoder_config": {
                "hidden_size": 16,
                "image_size": 64,
                "patch_size": 8,
                "mask_input_channels": 4,
                "image_embedding_size": 8,
            },
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "iou_head_depth": 2,
                "iou_head_hidden_dim": 16,
            },
        },
        lambda: {**large_image(), "input_points": 64 * torch.rand(2, 1, 2, 2)},
        attention_blocks=9,
    ),
    "vitdet": Row(
        "vitdet",
        {
            **VISION,
            "window_block_indices": [0],
            "window_size": 2,
            "use_relative_position_embeddings": True,
            "mlp_ratio": 2,
        },
        image,
    ),
    "hiera": Row(
        "hiera",
        {
            "image_size": [64, 64],
            "patch_size": [7, 7],
            "patch_stride": [4, 4],
            "embed_dim": 16,
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 2, 2, 4],
        },
        large_image,
        attention_blocks=5,
    ),
    "ijepa": Row("ijepa", VISION, image),
    "timesformer": Row("timesformer", _FRAMES, video, attention_blocks=4),
    "videomae": Row("videomae", {**_FRAMES, "tubelet_size": 2}, video),
    "vivit": Row("vivit", {**_FRAMES, "tubelet_size": [2, 8, 8]}, video),
}
