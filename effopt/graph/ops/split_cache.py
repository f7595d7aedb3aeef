"""What stands for the keys or values of a layer whose heads keep caches of two kinds.

    split_cache(kept, held, ...)   has the shape of all heads with every key, and no value

Attention wants one tensor with all heads. Where the cache really holds less for some of them there is no such
tensor, so a pass replaces the attention by one for each part, and these ops die with the attention. They are
no canonical ops: they have no meaning to lower, and where `split_cache` is really run, that pass was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor


@torch.library.custom_op("effopt::row_starts", mutates_args=())
def row_starts(states: Tensor) -> Tensor:
    """Position of the first token of each row, int64 `[b]`: 0, until a pass reads it from a padding mask."""
    return torch.zeros(states.shape[0], dtype=torch.int64, device=states.device)


@row_starts.register_fake
def _(states: Tensor) -> Tensor:
    return states.new_empty((states.shape[0],), dtype=torch.int64)


@torch.library.custom_op("effopt::split_cache", mutates_args=())
def split_cache(
    kept: Tensor,
    held: Tensor,
    queries: Tensor,
    starts: Tensor,
    positions: Optional[Tensor],
    streaming: Sequence[int],
    sink: int,
    recent: int,
    layer: str,
) -> Tensor:
    """Keys or values of all heads, in head order.

    Args:
        kept: of the heads that keep every key, `[b, hkv - n, s, d]`; no head at all is possible.
        held: of the `n` streaming heads, `[b, n, m, d]`.
        queries: positions of the new tokens, int64 `[t]`.
        starts: position of each row's first token, int64 `[b]`, from `row_starts`.
        positions: of the keys in `held`, int64 `[b, m]`, -1 where there is none. The first `sink` are the
            sinks, which may stand behind them again. None: `held` are the new tokens, the first of all.
        streaming: which heads `held` are, ascending.
        sink: first tokens of each row that a streaming head keeps.
        recent: last tokens that it keeps.
        layer: the layer's name, for the message.

    Returns:
        `[b, hkv, s, d]`, dtype and device of `kept`; only while a graph is traced.

    Raises:
        RuntimeError: whenever it is run.
    """
    raise RuntimeError(
        f"this cache keeps the first and the last keys only of some heads of {layer}, and the model was run"
        " as it is: compile it with the plan that the cache was made for, torch.compile(model,"
        ' backend="effopt", options={"plans": plan}), or pass another cache'
    )


@split_cache.register_fake
def _(
    kept: Tensor,
    held: Tensor,
    queries: Tensor,
    starts: Tensor,
    positions: Optional[Tensor],
    streaming: Sequence[int],
    sink: int,
    recent: int,
    layer: str,
) -> Tensor:
    b, others, s, d = kept.shape
    return kept.new_empty((b, others + len(streaming), s, d))
