"""Greedy decoding with a cache of fixed size, to be timed, and the bytes that it holds.

decoder = Decoder(torch.compile(model.forward, backend="effopt", dynamic=False), cache, prompt, length)
decoder.seconds_a_token(8)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effopt.errors import OptionError
from effopt.graph.derivation import derivations_of


class Decoder:
    """A model that reads a prompt, then decodes one token after the other, always the likeliest.

    The prompt is read again when the cache is full, so that a decoder can be timed as often as one likes.
    """

    def __init__(self, forward: Callable[..., Any], cache: Any, prompt: Tensor, length: int) -> None:
        """Compile nothing yet.

        Args:
            forward: of a `transformers` model that generates, compiled or not.
            cache: of fixed size; the decoder owns it.
            prompt: int64 [rows, t].
            length: tokens that the cache holds, more than the prompt has.

        Raises:
            OptionError: the cache has no room for a token after the prompt.
        """
        self.forward, self.cache, self.prompt = forward, cache, prompt
        self.room = length - prompt.shape[1]
        """Tokens that can still be decoded after the prompt."""
        if self.room < 1:
            raise OptionError(
                f"a cache of {length} tokens has no room to decode after a prompt of {prompt.shape[1]}: make"
                " it longer"
            )
        self._left = 0
        self._next = prompt

    @torch.no_grad()
    def begin(self) -> None:
        """Forget everything and read the prompt."""
        self.cache.reset()
        self._next = self._step(self.prompt)
        self._left = self.room

    @torch.no_grad()
    def decode(self, steps: int) -> Tensor:
        """The last of so many tokens, int64 [rows, 1]."""
        for _ in range(steps):
            if not self._left:
                self.begin()
            self._next = self._step(self._next)
            self._left -= 1
        return self._next

    def seconds_a_token(self, steps: int) -> float:
        """Decode `steps` tokens, those that `room` allows at most; reading the prompt is not counted."""
        steps = min(steps, self.room)
        if self._left < steps:
            self.begin()
        _wait()
        start = time.perf_counter()
        self.decode(steps)
        _wait()
        return (time.perf_counter() - start) / steps

    def _step(self, ids: Tensor) -> Tensor:
        out = self.forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        chosen: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return chosen

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values; those that several layers read count once."""
        names = ("keys", "values", "held_keys", "held_values")
        held = (getattr(layer, name, None) for layer in self.cache.layers for name in names)
        return storage_bytes(tensor for tensor in held if tensor is not None)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that a model still has, and of what its compiled graphs derived from them."""
    parameters = list(model.parameters())
    derived = [t for p in parameters for d in derivations_of(p) for t in d.held.values()]
    return storage_bytes([*parameters, *derived])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
