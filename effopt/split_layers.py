"""Layers of a `transformers` cache that keep all keys of some heads, of the others the first and the last.

    keys, values              of the heads that see all, as an ordinary layer keeps them
    held_keys, held_values    of the streaming heads, [b, n, sink + recent, d]: slot j has the j-th token of
                              the row, slot sink + p % recent the token at position p until another comes

Keys are held as they come, after their rotation, so that positions stay what they are. An update gives one
tensor that stands for all heads (`effopt.graph.ops.split_cache`), which only a compiled model can read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from effopt.graph.ops.split_cache import row_starts, split_cache


class _Split:
    """Holds `sink + recent` keys of streaming heads, and leaves all else to the ordinary layer's class."""

    supports_early_init = False
    is_croppable = False

    def split(self, decision: Mapping[str, Any], name: str) -> None:
        """Take over what a plan decided for this layer."""
        self.streaming, self.name = tuple(decision["streaming"]), name
        self.sink, self.recent = decision["sink"], decision["recent"]
        self.held_keys: Tensor | None = None
        self.held_values: Tensor | None = None
        self.is_empty = True

    def update(self, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Keep what is to be kept; stands for the keys and values of all heads while a graph is traced."""
        others = [head for head in range(keys.shape[1]) if head not in self.streaming]
        queries = torch.arange(keys.shape[-2], device=keys.device) + self._seen()
        kept = super().update(_pick(keys, others), _pick(values, others), *args, **options)  # type: ignore[misc]
        new = _pick(keys, self.streaming), _pick(values, self.streaming)
        starts = row_starts(keys)
        held, positions = self._hold(new, queries, starts)
        shared = (queries, starts, positions, self.streaming, self.sink, self.recent, self.name)
        return split_cache(kept[0], held[0], *shared), split_cache(kept[1], held[1], *shared)

    def _hold(
        self, new: tuple[Tensor, Tensor], queries: Tensor, starts: Tensor
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Write the new tokens `[b, n, t, d]`; gives what their queries read, and where it stands."""
        if self.held_keys is None or self.held_values is None:
            self.held_keys, self.held_values = (self._allocated(states) for states in new)
        both = self.held_keys, self.held_values
        is_first, self.is_empty = self.is_empty, False
        sinks = starts[:, None] + torch.arange(self.sink, device=starts.device)
        for held, states in zip(both, new, strict=True):
            self._write_sinks(held, states, sinks - queries[0])
        sinks = torch.where(sinks <= queries[-1], sinks, -1)
        if queries.shape[0] == 1:
            for held, states in zip(both, new, strict=True):
                held.index_copy_(2, self.sink + queries % self.recent, states)
            return both, torch.cat([sinks, self._ring(queries[-1]).expand(len(sinks), -1)], 1)
        # Queries before the last one also read what the last tokens are about to replace.
        read = new if is_first else [torch.cat(pair, 2) for pair in zip(both, new, strict=True)]
        behind = torch.cat([self._ring(queries[0] - 1), queries])
        index = self._ring(queries[-1]) - queries[0]
        for held, states in zip(both, new, strict=True):
            ring = held[:, :, self.sink :]
            ring.copy_(torch.where(index[:, None] >= 0, states.index_select(2, index.clamp(min=0)), ring))
        return read, None if is_first else torch.cat([sinks, behind.expand(len(sinks), -1)], 1)

    def _write_sinks(self, held: Tensor, new: Tensor, index: Tensor) -> None:
        """Take new tokens as sinks; `index` `[b, sink]` says which, outside of them: none."""
        _, n, t, d = new.shape
        is_new = ((index >= 0) & (index < t))[:, None, :, None]
        taken = new.gather(2, index.clamp(0, t - 1)[:, None, :, None].expand(-1, n, -1, d))
        sinks = held[:, :, : self.sink]
        sinks.copy_(torch.where(is_new, taken, sinks))

    def _ring(self, last: Tensor) -> Tensor:
        """Positions of the tokens in the ring after the token at `last`, int64 `[recent]`; -1: none."""
        slots = torch.arange(self.recent, device=last.device)
        return (last - (last - slots) % self.recent).clamp(min=-1)

    def _allocated(self, like: Tensor) -> Tensor:
        b, n, _, d = like.shape
        return like.new_zeros((b, n, self.sink + self.recent, d))

    def _seen(self) -> Any:
        """How many tokens there were before this update: a number or a scalar tensor."""
        raise NotImplementedError

    def _each_held(self, change: Any) -> None:
        if self.held_keys is not None and self.held_values is not None:
            self.held_keys, self.held_values = change(self.held_keys), change(self.held_values)

    def offload(self) -> None:
        super().offload()  # type: ignore[misc]
        self._each_held(lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()  # type: ignore[misc]
        self._each_held(lambda held: held.to(self.device, non_blocking=True))  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.is_empty = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._each_held(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._each_held(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._each_held(lambda held: held[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Raises RuntimeError if anything is to go: what it replaced in a ring is not there any more."""
        if tokens_to_remove:
            raise RuntimeError(
                f"{self.name} keeps the last {self.recent} keys of some heads, and cannot give back tokens:"
                " decode without assistant and prompt lookup, or with an ordinary cache"
            )


class SplitDynamicLayer(_Split, DynamicLayer):  # type: ignore[misc]
    """Grows, but for the streaming heads."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def _seen(self) -> Any:
        return self.get_seq_length()

    def get_seq_length(self) -> int:
        """How many tokens there were. There may be no heads that keep them."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def reset(self) -> None:
        super().reset()
        self.held_keys = self.held_values = None


class SplitStaticLayer(_Split, StaticLayer):  # type: ignore[misc]
    """Allocated once."""

    cumulative_length: Tensor

    def _seen(self) -> Any:
        return self.cumulative_length

    def _allocated(self, like: Tensor) -> Tensor:
        held = super()._allocated(like)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(held)
        return held


SPLIT: dict[type, type] = {DynamicLayer: SplitDynamicLayer, StaticLayer: SplitStaticLayer}
"""Class of an ordinary layer -> the class whose heads are split. No other class can be."""


def _pick(states: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of `[b, h, t, d]`: a view where they are neighbours."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1][1] = head + 1
        else:
            runs.append([head, head + 1])
    parts = [states[:, first:last] for first, last in runs] or [states[:, :0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
