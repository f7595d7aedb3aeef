"""The tiny language model: its configuration, and the trained checkpoint beside this file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import torch as safetensors
from transformers import LlamaConfig, LlamaForCausalLM

CHECKPOINT = Path(__file__).parent / "checkpoint"
WEIGHTS, CONFIG, NUMBERS = "model.safetensors", "config.json", "numbers.json"
SHA256 = f"{WEIGHTS}.sha256"
"""The hash of numbers.json once more, as `sha256sum -c` and `effopt bench quality` read it."""


class CheckpointError(RuntimeError):
    """The checkpoint is incomplete, or its bytes are not those that were measured."""


def config(layers: int = 12, hidden: int = 256, context: int = 1024, vocab: int = 264) -> LlamaConfig:
    """The model that is trained, 9 M parameters; the arguments make a smaller one for tests."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=256,
        use_cache=False,
    )


def build(of: LlamaConfig, attention: str = "sdpa") -> LlamaForCausalLM:
    """A model with new weights, float32, drawn from torch's generator; nothing is fetched."""
    of._attn_implementation = attention
    return LlamaForCausalLM(of)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16 (18 MB) and the configuration; evaluate.py adds the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    safetensors.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.to_json_file(folder / CONFIG)


def load(
    folder: Path = CHECKPOINT, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> LlamaForCausalLM:
    """The trained model, in evaluation mode.

    Raises:
        CheckpointError: a file is missing, or the sha256 of the weights is not the one in numbers.json.
    """
    missing = [name for name in (WEIGHTS, CONFIG, NUMBERS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: train.py and evaluate.py write them")
    expected, got = json.loads((folder / NUMBERS).read_text())["sha256"], sha256(folder / WEIGHTS)
    if expected != got:
        raise CheckpointError(
            f"{folder / WEIGHTS} has sha256 {got}, but its numbers were measured on {expected}: "
            "restore the file (is it a partial download?), or run evaluate.py to measure the new weights"
        )
    return read(folder, attention).to(dtype)


def read(folder: Path, attention: str = "sdpa") -> LlamaForCausalLM:
    """The model in a folder, float32, in evaluation mode, whatever its weights are."""
    model = build(LlamaConfig.from_json_file(folder / CONFIG), attention)
    model.load_state_dict(safetensors.load_file(folder / WEIGHTS))
    return model.eval()
