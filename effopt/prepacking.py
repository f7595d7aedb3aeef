"""Prompts of a padded batch laid side by side in fewer rows, so that no padding is computed.

    packed = effopt.prepack(model, input_ids, attention_mask)
    logits = packed.unpack(compiled(**packed.inputs).logits)

    prefill = torch.compile(effopt.PackedPrefill(model), backend="effopt")
    cache = packed.unpack_cache(prefill(**packed.inputs_of_prefill).past_key_values)
    cache.crop(-1)  # of a batch padded on the left: `generate` computes the last tokens
    tokens = model.generate(input_ids, attention_mask=attention_mask, past_key_values=cache)

Which prompts share a row depends on their lengths, which are values: this happens before the graph, not in
it. In the graph, positions that start again are the documents of `recover-mask-structure`.

Source: Zhao et al. 2024, arXiv:2404.09529 (bin packing, restarted positions, independent masks).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from effopt.errors import EffoptError

_KNOWN_LAYERS = ("full_attention", "sliding_attention")
"""Kinds of layers whose masks count from a token's own place: a prompt may begin anywhere in a row."""
_PROBE = ((3, 5, 4), (4, 3))
"""Two short prompts, tokens of which any vocabulary has."""
_KEEPS_APART: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Models that were tried -> the attention that they had then. One trial serves all batches of a model."""


@dataclass(frozen=True)
class Packed:
    """A packed batch `[rows, length]`, and where its tokens stood in the padded one, `[b, t]`."""

    input_ids: Tensor
    """Integers `[rows, length]`; 0 where a row is not filled."""
    position_ids: Tensor
    """int64 `[rows, length]`, from 0 in each prompt; 0 where a row is not filled."""
    documents: Tensor
    """int64 `[rows, length]`: which prompt of the batch a token is of; -1 where a row is not filled."""
    places: Tensor
    """int64 `[b, t]`: the place of each token among rows * length; -1 for padding."""
    config: Any
    """The model's, for its cache and the form of its masks."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of a call without a cache: `transformers` reads the prompts' ends from the positions."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}

    def inputs_with_cache(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a call that fills a cache, with a mask `[rows, 1, length, length]`.

        Beside a cache `transformers` does not look at the positions. The mask is an input of the graph, so
        nothing is skipped by it: compile `PackedPrefill(model)` for that.

        Args:
            dtype: of the model, for a mask that is added.

        Raises:
            EffoptError: the attention takes no such mask, or a layer sees a window, which it would open.
        """
        from transformers import DynamicCache

        _refuse_mask(self.config)
        mask, cache = _mask_of(self.documents, self.config, dtype), DynamicCache(config=self.config)
        return {**self.inputs, "attention_mask": mask, "past_key_values": cache, "use_cache": True}

    @property
    def inputs_of_prefill(self) -> dict[str, Tensor]:
        """Arguments of a `PackedPrefill`."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "documents": self.documents,
        }

    def unpack(self, packed: Tensor) -> Tensor:
        """`[rows, length, ...]`, one entry for each token, as `[b, t, ...]`: 0 at padding."""
        flat = packed.flatten(0, 1)[self.places.clamp(min=0)]
        return flat.masked_fill((self.places < 0).reshape(*self.places.shape, *[1] * (flat.dim() - 2)), 0)

    def last(self, packed: Tensor) -> Tensor:
        """Of `[rows, length, ...]` what belongs to the last token of each prompt, `[b, ...]`."""
        ends = torch.where(self.places < 0, -1, torch.arange(self.places.shape[1], device=self.places.device))
        return packed.flatten(0, 1)[self.places.gather(1, ends.amax(1, keepdim=True)).squeeze(1)]

    def unpack_cache(self, cache: Any) -> Any:
        """A `DynamicCache` of the padded batch, of one that `inputs_with_cache` filled: 0 at padding."""
        from transformers import DynamicCache

        made = DynamicCache(config=self.config)
        for index, layer in enumerate(cache.layers):
            keys, values = (
                self.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (layer.keys, layer.values)
            )
            made.update(keys.contiguous(), values.contiguous(), index)
        return made


class PackedPrefill(nn.Module):
    """A model that fills a cache from packed rows. Compiled, its graph knows where each prompt ends."""

    def __init__(self, model: nn.Module) -> None:
        """Of the model that was given to `prepack`, compiled or not. Its weights are shared.

        Raises:
            EffoptError: the attention takes no mask of 4 dimensions, or a layer sees a window.
        """
        # Not in `forward`: Dynamo 2.11 cuts the graph at an import from a package that loads its names late.
        from transformers import DynamicCache

        super().__init__()
        self.model: Any = getattr(model, "_orig_mod", model)
        self.config = self.model.config.get_text_config()
        self._cache_of: Any = DynamicCache
        _refuse_mask(self.config)

    def forward(self, input_ids: Tensor, position_ids: Tensor, documents: Tensor) -> Any:
        """The model's output, of `Packed.inputs_of_prefill`; its `past_key_values` are of the rows."""
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=_mask_of(documents, self.config, next(self.model.parameters()).dtype),
            past_key_values=self._cache_of(config=self.config),
            use_cache=True,
        )


def _refuse_mask(config: Any) -> None:
    kind = config._attn_implementation
    if kind not in ("eager", "sdpa"):
        raise EffoptError(f"attention {kind!r} takes no mask of 4 dimensions; use 'sdpa' or 'eager'")
    if "sliding_attention" in _layer_types(config):
        raise EffoptError("layers with a window and a cache: one mask of 4 dimensions would open the window")


def _mask_of(documents: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """Which keys a query sees, `[rows, 1, length, length]`: bool, or added where the attention is eager."""
    at = torch.arange(documents.shape[1], device=documents.device)
    seen = (documents[:, None, :, None] == documents[:, None, None, :]) & (at <= at[:, None])
    if config._attn_implementation == "sdpa":
        return seen
    nothing = torch.zeros((), dtype=dtype, device=documents.device)
    return torch.where(seen, nothing, torch.full_like(nothing, torch.finfo(dtype).min))


@torch.no_grad()
def prepack(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, length: int | None = None
) -> Packed:
    """Lay the prompts of a padded batch side by side in as few rows as first-fit decreasing finds.

    Exact up to rounding: each token sees its own prompt, at the position that it has there. So the results
    are those of the padded batch with positions that begin at the first token; without them `transformers`
    counts padding on the left as well, which a model with learned positions does see. The model is tried
    once, on two short prompts, alone and packed; one of 16 bits in float32, for which its weights are copied.

    Args:
        model: of `transformers`, in eval mode, compiled or not; called as it is for the trial.
        input_ids: integers `[b, t]`.
        attention_mask: `[b, t]`, not 0 for tokens; padding on either side, on both, or none.
        length: tokens of a row, at least the longest prompt, which is the default.

    Raises:
        EffoptError: a prompt is empty, has padding inside, or is longer than the rows or the positions; or
            packed prompts do not give what they give alone.
    """
    model = getattr(model, "_orig_mod", model)
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        got = f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
        raise EffoptError(f"prepack takes ids and a mask of one shape [b, t], got {got}")
    if not input_ids.numel():
        raise EffoptError(f"prepack takes prompts with tokens, got a batch {tuple(input_ids.shape)}")
    seen = attention_mask != 0
    lengths = [int(n) for n in seen.sum(1)]
    _check_prompts(seen, lengths)
    config = _checked_config(model, max(lengths))
    length = max(lengths) if length is None else length
    if length < max(lengths):
        raise EffoptError(f"rows of {length} tokens, and a prompt has {max(lengths)}: make `length` larger")
    if _KEEPS_APART.get(model) != config._attn_implementation:
        _try(model, config)
        _KEEPS_APART[model] = config._attn_implementation
    return _laid_out(input_ids, seen, lengths, length, config)


def _check_prompts(seen: Tensor, lengths: list[int]) -> None:
    edges = seen.to(torch.int8).diff(dim=1).abs().sum(1) + seen[:, 0] + seen[:, -1]
    for row, (n, changes) in enumerate(zip(lengths, edges.tolist(), strict=True)):
        if not n:
            raise EffoptError(f"prompt {row} has no token: leave it out of the batch")
        if changes > 2:
            raise EffoptError(f"prompt {row} has padding between its tokens: only that at its ends can go")


def _checked_config(model: nn.Module, longest: int) -> Any:
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise EffoptError(f"{name} is no model of transformers with one stack of layers")
    if model.training:
        raise EffoptError(
            f"{name} is in training mode, so that packed rows cannot be tried: call model.eval()"
        )
    config = config.get_text_config()
    foreign = sorted(set(_layer_types(config)) - set(_KNOWN_LAYERS))
    if foreign:
        raise EffoptError(
            f"{name} has layers of kind {foreign[0]!r}, to which a prompt's place in a row matters"
        )
    limit = getattr(config, "max_position_embeddings", None)
    is_rotary = any(isinstance(getattr(m, "inv_freq", None), Tensor) for m in model.modules())
    if limit is not None and 0 <= limit < longest and not is_rotary:
        raise EffoptError(f"a prompt has {longest} tokens, and {name} has {limit} positions")
    return config


def _layer_types(config: Any) -> list[str]:
    """Kinds of the layers; a window that holds for all of them makes each a sliding one."""
    stated = getattr(config, "layer_types", None)
    if stated:
        return list(stated)
    if getattr(config, "attention_chunk_size", None):
        return ["chunked_attention"]
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def _try(model: nn.Module, config: Any) -> None:
    """Raise EffoptError if two packed prompts do not give what each gives alone.

    In float32 or wider: the rounding of 16 bits is as large as what some models make of it.
    """
    wide = {
        name: x.float()
        for name, x in (*model.named_parameters(), *model.named_buffers())
        if x.is_floating_point() and x.dtype.itemsize < 4
    }

    def run(**inputs: Any) -> Tensor:
        return _first(functional_call(model, wide, kwargs=inputs))

    device = next(model.parameters()).device
    ids = torch.zeros(2, max(map(len, _PROBE)), dtype=torch.int64, device=device)
    for row, prompt in enumerate(_PROBE):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device) % config.vocab_size
    lengths = [len(prompt) for prompt in _PROBE]
    seen = torch.arange(ids.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
    packed = _laid_out(ids, seen, lengths, sum(lengths), config)
    together = packed.unpack(run(**packed.inputs))
    for row, n in enumerate(lengths):
        alone = run(input_ids=ids[row : row + 1, :n], use_cache=False)[0]
        if not torch.allclose(together[row, :n], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max())):
            raise EffoptError(
                f"{type(model).__name__} does not keep packed prompts apart by `position_ids`: prompts give"
                " other results in one row than alone"
            )


def _first(output: Any) -> Tensor:
    """Logits, or the last hidden state."""
    found: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found


def _laid_out(ids: Tensor, seen: Tensor, lengths: list[int], length: int, config: Any) -> Packed:
    rows: list[list[int]] = []
    for prompt in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (row for row in rows if sum(lengths[i] for i in row) + lengths[prompt] <= length)
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(prompt)
    empty = torch.zeros(len(rows), length, dtype=torch.int64, device=ids.device)
    packed, positions, documents = empty.to(ids.dtype), empty.clone(), empty - 1
    places = torch.full(ids.shape, -1, dtype=torch.int64, device=ids.device)
    for number, row in enumerate(rows):
        start = 0
        for prompt in row:
            n, at = lengths[prompt], slice(start, start + lengths[prompt])
            packed[number, at] = ids[prompt, seen[prompt]]
            positions[number, at] = torch.arange(n, device=ids.device)
            documents[number, at] = prompt
            places[prompt, seen[prompt]] = torch.arange(n, device=ids.device) + number * length + start
            start += n
    return Packed(packed, positions, documents, places, config)
