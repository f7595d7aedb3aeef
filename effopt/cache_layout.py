"""Which kind of layer stands where in the cache of a planned decoder, and making that cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache

from effopt.cache_layers import FOLLOWING, LEADING, AbsentLayer
from effopt.errors import PlanError
from effopt.split_layers import SPLIT


def build(
    config: Any,
    absent: Set[int],
    follows: Mapping[int, int],
    names: Mapping[int, str],
    max_cache_len: int | None = None,
    has_cross_attention: bool = False,
    splits: Mapping[int, Any] | None = None,
) -> Any:
    """The cache of a decoder, some of whose layers hold nothing.

    Args:
        config: of the decoder; it says how many layers there are and of which kinds.
        absent: indices of the layers that are skipped.
        follows: index of a layer -> index of the earlier one whose keys and values it reads.
        names: index -> what messages call the layer.
        max_cache_len: tokens to hold, for a static cache; None for a dynamic one.
        has_cross_attention: make a cache for it too. It is written once, at the encoder's length, which
            only a growing layer takes over by itself.
        splits: index of a layer -> which of its heads stream, as `split-heads-by-role` decides it.

    Raises:
        PlanError: a layer is of a kind that cannot be left out or shared, or does not exist.
    """
    own = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len)
    own.layers = _without(own.layers, absent, follows, names, splits or {})
    if not has_cross_attention:
        return own
    cross = DynamicCache(config=config)
    cross.layers = _without([DynamicLayer() for _ in cross.layers], absent, follows, names, {})
    return EncoderDecoderCache(own, cross)


def _without(
    layers: Sequence[Any],
    absent: Set[int],
    follows: Mapping[int, int],
    names: Mapping[int, str],
    splits: Mapping[int, Any],
) -> list[Any]:
    """`layers`, with those that lead, follow, are split or are absent in place of the ordinary ones."""
    if names and len(layers) != len(names):
        raise PlanError(f"the plan does not fit: it has {len(names)} layers, the cache {len(layers)}")
    _check(layers, absent, follows, names)
    made = list(layers)
    for index in set(follows.values()):
        made[index] = _again(layers[index], LEADING[type(layers[index])])
    last = {lead: follower for follower, lead in sorted(follows.items())}
    for index, lead in follows.items():
        made[index] = _again(layers[index], FOLLOWING[type(layers[index])])
        made[index].follow(made[lead], last[lead] == index, names[index])
    for index, decision in splits.items():
        kind = type(layers[index])
        if kind not in SPLIT or index in {*absent, *follows, *follows.values()}:
            has = f"keeps a {kind.__name__}" if kind not in SPLIT else "is skipped or shares its keys"
            raise PlanError(f"{names[index]} {has}: its heads cannot keep caches of two kinds")
        made[index] = _again(layers[index], SPLIT[type(layers[index])])
        made[index].split(decision, names[index])
    kept = [
        i for i in range(len(layers)) if i not in absent and i not in follows and type(layers[i]) in LEADING
    ]
    for index in absent:
        # The nearest layer of the same kind: its masks have the same size.
        alike = [k for k in kept if layers[k].is_sliding == layers[index].is_sliding] or kept
        nearest = min(alike, key=lambda k: (abs(k - index), k))
        made[index] = AbsentLayer(made[nearest], nearest < index, names[index])
    return made


def _check(
    layers: Sequence[Any], absent: Set[int], follows: Mapping[int, int], names: Mapping[int, str]
) -> None:
    for index in (*absent, *follows, *follows.values()):
        if type(layers[index]) not in LEADING:
            kind = type(layers[index]).__name__
            raise PlanError(f"{names[index]} keeps a {kind}, which can be neither left out nor shared")
    for index, lead in follows.items():
        if lead in absent or lead in follows or lead >= index:
            raise PlanError(f"{names[index]} reads {names[lead]}, which keeps no keys and values before it")
        if _form(layers[lead]) != _form(layers[index]):
            raise PlanError(f"{names[index]} and {names[lead]} keep caches of different kinds or windows")
    if absent and all(i in absent or type(layer) not in LEADING for i, layer in enumerate(layers)):
        raise PlanError("the plan skips every layer that has a cache")


def _form(layer: Any) -> tuple[Any, ...]:
    return type(layer), getattr(layer, "max_cache_len", None), getattr(layer, "sliding_window", None)


def _again(layer: Any, kind: type) -> Any:
    """An empty layer of class `kind` for the same lengths as `layer`."""
    # A static sliding layer holds the smaller of its two arguments, and remembers only that.
    window = (
        layer.sliding_window if hasattr(layer, "sliding_window") else getattr(layer, "max_cache_len", None)
    )
    return kind(max_cache_len=getattr(layer, "max_cache_len", None), sliding_window=window)
