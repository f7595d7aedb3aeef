"""Layers of a `transformers` cache that hold nothing of their own.

    leading     an ordinary layer whose keys and values later layers read too
    following   stores nothing; its update gives what the leading layer's update gave in this step
    absent      stores nothing; its update has a shape but no value, for a layer that is skipped

Layers that hold less for some heads are in `split_layers.py`. These two modules alone subclass classes of
`transformers`, which is optional: they are imported on first use.
Lengths and mask sizes always come from a layer that is kept. A call to `get_seq_length` between the
updates of a leading and a following layer still gives each its own answer, as position biases need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from effopt.errors import PlanError
from effopt.graph.ops.absent_cache import absent_cache
from effopt.split_layers import SPLIT


class _Leading:
    """Remembers what its last update gave until the last layer that follows it has read that."""

    given: tuple[Tensor, Tensor] | None = None

    def update(self, *states: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.given = super().update(*states, **options)  # type: ignore[misc]
        return self.given


class _Following:
    """Reads the keys and values of `lead`, an earlier layer of the same class."""

    supports_early_init = False

    def follow(self, lead: Any, is_last: bool, name: str) -> None:
        """Read `lead` from now on; `is_last` of its followers to run."""
        self.lead, self.is_last, self.name = lead, is_last, name

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the leading layer gave in this step; `keys` and `values` of this layer are not stored."""
        given = self.lead.given
        if given is None:
            raise RuntimeError(f"{self.name} reads the keys and values of an earlier layer that has not run")
        if self.is_last:
            self.lead.given = None
        self._count(keys)
        self._reread()
        return given

    def _count(self, keys: Tensor) -> None:
        """Add the new tokens to this layer's length."""

    def _recount(self) -> None:
        """Take over the length of the leading layer."""

    def _reread(self) -> None:
        self.keys, self.values = self.lead.keys, self.lead.values
        self.is_initialized = self.lead.is_initialized

    def _take_over(self, *_: Any) -> None:
        # The cache changes its layers in order, so that the leading one has changed already.
        self._reread()
        self._recount()

    def _nothing(self, *_: Any) -> None:
        """Done by the leading layer."""

    lazy_initialization = offload = prefetch = activate_past_recording = _nothing
    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _take_over


class LeadingDynamicLayer(_Leading, DynamicLayer):  # type: ignore[misc]
    """Grows; read by others too."""


class FollowingDynamicLayer(_Following, DynamicLayer):  # type: ignore[misc]
    """Its length is that of the keys it last read."""


class LeadingDynamicSlidingLayer(_Leading, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Grows to the window; read by others too."""


class FollowingDynamicSlidingLayer(_Following, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Counts the tokens it has seen."""

    cumulative_length: int

    def _count(self, keys: Tensor) -> None:
        self.cumulative_length += keys.shape[-2]

    def _recount(self) -> None:
        self.cumulative_length = self.lead.cumulative_length


class LeadingStaticLayer(_Leading, StaticLayer):  # type: ignore[misc]
    """Allocated once; read by others too."""


class FollowingStaticLayer(_Following, StaticLayer):  # type: ignore[misc]
    """Counts the tokens it has seen in a scalar tensor, as static layers do."""

    cumulative_length: Tensor

    def _count(self, keys: Tensor) -> None:
        if not self.is_initialized:
            self.cumulative_length = self.cumulative_length.to(keys.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.cumulative_length)
        self.cumulative_length.add_(keys.shape[-2])

    def _recount(self) -> None:
        self.cumulative_length.copy_(self.lead.cumulative_length)


class LeadingStaticSlidingLayer(_Leading, StaticSlidingWindowLayer):  # type: ignore[misc]
    """Allocated once, for a window; read by others too."""


class FollowingStaticSlidingLayer(_Following, StaticSlidingWindowLayer):  # type: ignore[misc]
    """Counts the tokens it has seen."""

    def _count(self, keys: Tensor) -> None:
        self.cumulative_length_int += keys.shape[-2]

    def _recount(self) -> None:
        self.cumulative_length_int = self.lead.cumulative_length_int


class AbsentLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer that the compiled model skips. `kept` is a layer that it runs, which has the lengths."""

    supports_early_init = False
    is_croppable = True

    def __init__(self, kept: Any, kept_runs_first: bool, name: str) -> None:
        self.kept, self.kept_runs_first, self.name = kept, kept_runs_first, name
        self.is_sliding, self.is_compileable = kept.is_sliding, kept.is_compileable
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Tensors of the right shape while a graph is traced. Raises RuntimeError where it is run."""
        length = self._length(keys.shape[-2])
        return absent_cache(keys, length, self.name), absent_cache(values, length, self.name)

    def _length(self, new: int) -> int:
        """How many keys this step's update would give."""
        if not self.kept_runs_first:
            return self.get_mask_sizes(new)[0]
        if not self.is_sliding:
            return self.kept.keys.shape[-2]
        window = self.kept.max_cache_len if self.is_compileable else self.kept.sliding_window
        seen = self.kept.get_seq_length() - new
        held = min(seen, window - 1) + new
        return max(held, window) if self.is_compileable else held

    @property
    def keys(self) -> Tensor | None:
        """Read by cross attention in place of an update, once the encoder's keys are there."""
        return self._stands_for(self.kept.keys)

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._stands_for(self.kept.values)

    def _stands_for(self, kept: Tensor | None) -> Tensor | None:
        if kept is None or not torch.compiler.is_compiling():
            return None
        return absent_cache(kept, kept.shape[-2], self.name)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kept.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.kept.get_seq_length()

    def get_max_length(self) -> int:
        return self.kept.get_max_length()

    def _nothing(self, *_: Any) -> None:
        """There is nothing to change."""

    lazy_initialization = offload = prefetch = reset = activate_past_recording = _nothing
    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _nothing


LEADING: dict[type, type] = {
    DynamicLayer: LeadingDynamicLayer,
    DynamicSlidingWindowLayer: LeadingDynamicSlidingLayer,
    StaticLayer: LeadingStaticLayer,
    StaticSlidingWindowLayer: LeadingStaticSlidingLayer,
}
"""Class of an ordinary layer -> the class that leads. No other class can be shared or left out."""

FOLLOWING: dict[type, type] = {
    DynamicLayer: FollowingDynamicLayer,
    DynamicSlidingWindowLayer: FollowingDynamicSlidingLayer,
    StaticLayer: FollowingStaticLayer,
    StaticSlidingWindowLayer: FollowingStaticSlidingLayer,
}


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
