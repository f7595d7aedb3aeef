"""What stands in for the keys and values of a layer that is left out.

    absent_cache(states, length, layer)   has the shape that the layer's cache would give, and no value

A graph whose layer is skipped holds it only until dead code goes. It is no canonical op: it has no meaning
to lower, and where it is really run, the layer was not skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("effopt::absent_cache", mutates_args=())
def absent_cache(states: Tensor, length: int, layer: str) -> Tensor:
    """Keys or values of a layer that keeps none.

    Args:
        states: the layer's new keys or values, `[b, h, t, d]`.
        length: how many keys attention would read, `s`.
        layer: the layer's name, for the message.

    Returns:
        `[b, h, s, d]`, dtype and device of `states`; only while a graph is traced.

    Raises:
        RuntimeError: whenever it is run.
    """
    raise RuntimeError(
        f"this cache leaves out {layer}, but the model ran it: compile the model with the plan that the"
        ' cache was made for, torch.compile(model, backend="effopt", options={"plans": plan}), or pass'
        " another cache"
    )


@absent_cache.register_fake
def _(states: Tensor, length: int, layer: str) -> Tensor:
    return states.new_empty((*states.shape[:-2], length, states.shape[-1]))
