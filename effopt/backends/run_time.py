"""What a compiled call still does at run time, around the compiled code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from effopt.graph import release
from effopt.graph.held_masks import HeldMasks
from effopt.graph.kept_blocks import KeptBlocks
from effopt.graph.weights import DerivedWeights

Compiled = Callable[..., Any]


def with_fresh_weights(compiled: Compiled, weights: DerivedWeights) -> Compiled:
    """Give compiled code its constants, as its last inputs. `weights` lives as long as the code."""
    if not any(isinstance(value, torch.nn.Parameter) for value in weights.inputs):
        return compiled
    weights.forget_inputs()

    def call(*inputs: Any) -> Any:
        release.check_call(weights, inputs)
        return compiled(*inputs, *weights.tensors(inputs))

    return call


def while_masks_hold(compiled: Compiled, masks: HeldMasks, otherwise: Callable[[], Compiled]) -> Compiled:
    """Run what `otherwise` makes, once, while a buffer that the code stands on holds something else."""
    masks.forget_inputs()
    if not masks:
        return compiled
    make = functools.cache(otherwise)

    def call(*inputs: Any) -> Any:
        return (compiled if masks.hold(inputs) else make())(*inputs)

    return call


def between_steps(choose: Compiled, reuse: Compiled, kept: KeptBlocks) -> Compiled:
    """Run `choose`, which returns its blocks too, at one call in so many; else `reuse`, which takes them."""

    def call(*inputs: Any) -> Any:
        steps = kept.steps_of(inputs)
        blocks = kept.blocks_for(steps, inputs)
        if blocks is not None:
            return reuse(*inputs, *blocks)
        steps.forget()
        results = choose(*inputs)
        kept.take(steps, inputs, results[-kept.count :])
        return results[: -kept.count]

    return call


def without_autocast(compiled: Compiled) -> Compiled:
    """Run with autocast off, whatever is on around it: the casts are in the code."""

    def call(*inputs: Any) -> Any:
        with torch._C._DisableAutocast():
            return compiled(*inputs)

    return call


def unless_storage_is_shared(
    compiled: Compiled, written: Sequence[int], inputs: Sequence[Any], original: Compiled
) -> Compiled:
    """Run `original` when an input that is written shares memory with another one.

    Compiled code has read each input before it writes any. Dynamo guards against the same tensor passed
    twice, not against two views of one memory.

    Args:
        compiled: what runs otherwise.
        written: positions of the inputs that it writes.
        inputs: the inputs of the compile call. Parameters are left out: a module owns them.
        original: same call, uncompiled.
    """
    if not written:
        return compiled
    others = [
        i
        for i, value in enumerate(inputs)
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and i not in written
    ]

    def call(*inputs: Any) -> Any:
        memory = {inputs[i].untyped_storage()._cdata for i in written}
        if len(memory) < len(written) or any(inputs[i].untyped_storage()._cdata in memory for i in others):
            return original(*inputs)
        return compiled(*inputs)

    return call
