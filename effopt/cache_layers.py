"""Layers of a `transformers` cache that hold nothing of their own.

    leading     an ordinary layer whose keys and values later layers read too
    following   stores nothing; its update gives what the leading layer's update gave in this step
    absent      stores nothing; its update has a shape but no value, for a layer that is skipped

Layers that hold less for some heads are in `split_layers.py`. These two modules alone subclass classes of
`transformers`, which is optional: they, and `cache_layout.py`, are imported on first use.
Lengths and mask sizes always come from a layer that is kept. A call to `get_seq_length` between the
updates of a leading and a following layer still gives each its own answer, as position biases need.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from effopt.graph.ops.absent_cache import absent_cache


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
