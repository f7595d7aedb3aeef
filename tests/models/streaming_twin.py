"""Streaming heads done by hand: attention written out, over all keys, with a mask for each head.

Written from the definition and not from the pass: what a query sees is read off the model's own mask. Its
last open key is the query's own position, the first open key of the row's last query is where the row begins.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "streaming_twin"


def _mask(*args: Any, **kwargs: Any) -> Tensor:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def seen_by(mask: Tensor, sink: int, recent: int) -> Tensor:
    """What a streaming head sees of `mask` `[b, 1, t, s]`."""
    keys = torch.arange(mask.shape[-1])
    own = torch.where(mask, keys, -1).amax(-1, keepdim=True)
    begin = torch.where(mask, keys, mask.shape[-1]).amin(-1)[:, :, -1, None, None]
    return mask & ((keys > own - recent) | ((keys >= begin) & (keys < begin + sink)))


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    seen = mask.expand(mask.shape[0], query.shape[1], *mask.shape[2:]).clone()
    decision = module.streaming_decision
    if decision is not None:
        mine = seen_by(mask, decision["sink"], decision["recent"])
        for head in decision["streaming"]:
            seen[:, head * group : (head + 1) * group] = mine
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    scores = (query @ key.mT * scale).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row of padding sees nothing, and gives 0
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def streaming_twin_of(model: nn.Module, decisions: Mapping[int, Any]) -> nn.Module:
    """A copy whose layers' heads stream as `decisions` say: index of a layer -> what a plan says of it."""
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation(_NAME)
    for module in twin.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.streaming_decision = decisions.get(module.layer_idx)
    return twin
