"""Keys of a cache moved to other positions, after tokens before them were inserted or deleted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effopt.errors import EffoptError
from effopt.graph import ops
from effopt.graph.tolerances import tolerance_of

_MOVING = ("dynamic", "longrope")
"""Kinds of rotation whose frequencies hang on the length: keys of one cache may be turned by several."""
_PROBES = (3, 5)
"""Position of the token that the rotation is tried on, and its shift."""


@torch.no_grad()
def rerotate(model: nn.Module, cache: Any, start: int, shift: int, stop: int | None = None) -> None:
    """Turn cached keys as if their tokens stood `shift` positions later; values do not change.

    The rotations of one key add up, so this is exact up to rounding. What later tokens saw is not computed
    again: their keys and values still know the text before the edit (He et al. 2024, arXiv:2407.03157).

    The rotation is read from the model, and tried on it: one token, run at two positions, must give in every
    layer keys that differ by just that rotation. Halves, pairs and partial rotations are told apart so.

    Args:
        model: a decoder of `transformers` with one rotary embedding.
        cache: its `DynamicCache` or `StaticCache`; its keys are changed.
        start: index of the first token that moves.
        shift: positions that it moves by; negative after a deletion.
        stop: index after the last; None for all that are cached.

    Raises:
        EffoptError: the rotation is not known, hangs on the length, or is not that of every layer; or a layer
            keeps only a window. Nothing is changed then.
    """
    model = getattr(model, "_orig_mod", model)
    frequencies = _frequencies(model)
    sliding = [i for i, layer in enumerate(cache.layers) if getattr(layer, "is_sliding", False)]
    if sliding:
        raise EffoptError(f"layer {sliding[0]} of the cache keeps a window: its indices are not positions")
    pairs = _is_by_pairs(model, frequencies, len(cache.layers))
    length = int(cache.get_seq_length())
    stop = length if stop is None else stop
    if not 0 <= start <= stop <= length or start + shift < 0:
        raise EffoptError(f"tokens {start} to {stop} by {shift}: the cache holds positions 0 to {length}")
    for layer in cache.layers:
        keys = layer.keys.clone()
        keys[:, :, start:stop] = turned(keys[:, :, start:stop], frequencies, shift, pairs)
        if getattr(layer, "is_compileable", False):
            layer.keys.copy_(keys)  # compiled code knows its address
        else:
            layer.keys = keys


def turned(keys: Tensor, frequencies: Tensor, shift: int, pairs: bool) -> Tensor:
    """Keys `[b, h, s, d]` turned by `shift` positions; computed in float32 or wider.

    Args:
        keys: floating.
        frequencies: `[r / 2]`; the first r numbers of a head are turned.
        shift: positions.
        pairs: whether a rotation turns neighbours, not halves.
    """
    angle = shift * frequencies.double()
    angle = angle.repeat_interleave(2) if pairs else torch.cat((angle, angle))
    wide = torch.promote_types(keys.dtype, torch.float32)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    return ops.rope.reference(keys.to(wide), cos, sin, interleaved=pairs).to(keys.dtype)


def _frequencies(model: nn.Module) -> Tensor:
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise EffoptError(
            f"{type(model).__name__} has {len(found)} rotary embeddings with `inv_freq`, not one"
        )
    kind = getattr(found[0], "rope_type", "default")
    if kind in _MOVING:
        raise EffoptError(f"the rotation is {kind!r}: its frequencies hang on the length of the text")
    frequencies: Any = found[0].inv_freq
    return frequencies


def _is_by_pairs(model: nn.Module, frequencies: Tensor, layers: int) -> bool:
    """The layout in which the model turns its keys, in all layers. Raises EffoptError."""
    position, shift = _PROBES
    before, after = (_keys_at(model, p) for p in (position, position + shift))
    if len(before) != layers:
        raise EffoptError(f"the cache has {layers} layers, the model {len(before)}")
    rtol = 4 * tolerance_of(before[0].dtype).rtol
    if 2 * frequencies.numel() <= before[0].shape[-1]:
        for pairs in (False, True):
            same = [
                torch.allclose(
                    turned(x, frequencies, shift, pairs), y, rtol=rtol, atol=rtol * float(y.abs().max())
                )
                for x, y in zip(before, after, strict=True)
            ]
            if all(same):
                return pairs
    raise EffoptError(
        f"{type(model).__name__} does not turn the keys of every layer by its `inv_freq` alone, so that they"
        " cannot be moved"
    )


def _keys_at(model: Any, position: int) -> list[Tensor]:
    """The keys of one token, alone, in all layers: it sees itself only, wherever it stands."""
    from transformers import DynamicCache

    cache, device = DynamicCache(), next(model.parameters()).device
    token, at = (torch.tensor([[n]], device=device) for n in (1, position))
    model(input_ids=token, position_ids=at, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]
