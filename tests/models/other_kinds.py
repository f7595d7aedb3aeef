"""Small random models that are not language models alone: vision, sound, encoders with decoders, and others.

    model, inputs = build_other("swinv2", "eager")
    model(**inputs)

Rows are in the files by kind; nothing is downloaded.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.models import audio_rows, encoder_decoder_rows, mixed_rows, vision_rows
from tests.models.row import Row

OTHER_KINDS: dict[str, Row] = {
    **vision_rows.ROWS,
    **audio_rows.ROWS,
    **encoder_decoder_rows.ROWS,
    **mixed_rows.ROWS,
}


def build_other(name: str, attn: str = "eager", **config: Any) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A model in evaluation mode, without dropout and caches, and inputs for its forward pass.

    Args:
        name: a key of `OTHER_KINDS`.
        attn: `eager` or `sdpa`; ValueError if the architecture has none of it.
        config: entries that override the row's.
    """
    row = OTHER_KINDS[name]
    settings = transformers.AutoConfig.for_model(row.model_type, **{**row.config, **config})
    settings = getattr(settings, row.part) if row.part else settings
    for entry, value in vars(settings).items():
        if ("drop" in entry or entry in ("attn_pdrop", "embd_pdrop", "resid_pdrop")) and isinstance(
            value, float
        ):
            setattr(settings, entry, 0.0)
    if "use_cache" not in config:
        settings.use_cache = False
    torch.manual_seed(0)
    settings._attn_implementation = attn
    model_class = _class_of(row.head)
    model = model_class.from_config(settings) if row.head.startswith("Auto") else model_class(settings)
    return model.eval(), row.inputs()


def _class_of(name: str) -> Any:
    module, _, short = name.rpartition(".")
    return getattr(
        importlib.import_module(f"transformers.models.{module}") if module else transformers, short
    )


def all_outputs(outputs: Any) -> list[Tensor]:
    """Every floating-point tensor that a model returns."""
    leaves = torch.utils._pytree.tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
