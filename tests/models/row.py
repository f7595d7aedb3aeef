"""One row of a table of architectures that are not language models alone, and the inputs that rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """A model class, its configuration class by `model_type`, its configuration, and what it is given."""

    model_type: str
    config: Mapping[str, Any]
    inputs: Callable[[], Inputs]
    head: str = "AutoModel"
    """A class of `transformers`, or `package.Class` below `transformers.models`."""
    attention_blocks: int = 2
    """Softmax between two products of one forward pass, each computed once."""
    left: int = 0
    """How many of them effopt leaves alone. It tells why."""
    part: str = ""
    """Which part of the configuration the model class takes; empty: all of it."""


VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 66,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BOTH_STACKS: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112,
}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 100,
    **BOTH_STACKS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}


def ids(length: int = 12, most: int = 100) -> Tensor:
    return torch.randint(3, most, (2, length))


def tokens() -> Inputs:
    return {"input_ids": ids()}


def image(size: int = 32) -> Inputs:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def large_image() -> Inputs:
    return image(64)


def video() -> Inputs:
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32)}


def image_and_tokens() -> Inputs:
    return {"input_ids": ids(), **image()}


def two_texts() -> Inputs:
    return {"input_ids": ids(), "decoder_input_ids": ids(7)}


def wave() -> Inputs:
    return {"input_values": torch.randn(2, 1600)}


def boxes() -> Tensor:
    corner = torch.randint(0, 40, (2, 12, 2))
    return torch.cat([corner, corner + torch.randint(1, 20, (2, 12, 2))], -1)
