"""A key-value cache for a planned model: `generate(past_key_values=effopt.cache_for(model, plan))`.

Layers that the plan skips hold no memory; layers that read the keys and values of another hold none of
their own; of heads that stream only the first and the last keys and values are held. All others are as
`transformers` makes them for this model, sliding windows included.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from effopt.errors import EffoptError, PlanError
from effopt.passes.plan import Entry, Plan, PlannedStack

_SKIPPING = ("skip-layers", "drop-layers")
_SHARING = "share-kv-across-layers"
_SPLITTING = "split-heads-by-role"


def cache_for(model: nn.Module, plan: Plan, *, max_cache_len: int | None = None) -> Any:
    """A `transformers` cache that allocates only what a plan leaves.

    Args:
        model: a model of `transformers` that generates; compiled or not.
        plan: of `effopt.calibrate` or `effopt.Plan.load`; sections of other passes change nothing here.
        max_cache_len: tokens to hold, for a cache of fixed size; without it the cache grows. The cross
            attention of encoder-decoder models is always held at the length of what was encoded.

    Returns:
        A `DynamicCache` or `StaticCache`, or an `EncoderDecoderCache` of them. It must be used with the
        model compiled under the same plan: the model as it is may not run a layer that is left out, and
        raises then, as it does where heads stream. A plan that only shares works without compilation too.

    Raises:
        EffoptError: `transformers` is not installed, or the model has no key-value cache.
        PlanError: the plan is of another model, or names a layer whose cache is of another kind.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise EffoptError(
            "effopt.cache_for makes caches of transformers: pip install transformers"
        ) from error
    from effopt.cache_layout import build

    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    decoder = _decoder(model)
    absent, follows, splits, names = _layout(model, decoder, plan)
    has_cross_attention = bool(getattr(model.config, "is_encoder_decoder", False))
    holder: Any = decoder if has_cross_attention else model
    config = holder.config.get_text_config(decoder=True)
    return build(config, absent, follows, names, max_cache_len, has_cross_attention, splits)


def _decoder(model: nn.Module) -> Any:
    """The part that holds the layers of the cache."""
    get_decoder, config = getattr(model, "get_decoder", None), getattr(model, "config", None)
    decoder = get_decoder() if get_decoder is not None else None
    takes_cache = decoder is not None and "past_key_values" in inspect.signature(decoder.forward).parameters
    is_encoder = getattr(getattr(decoder, "config", None), "is_decoder", None) is False
    if config is None or decoder is None or not takes_cache or is_encoder:
        raise EffoptError(
            f"{type(model).__name__} has no key-value cache: cache_for takes decoders of transformers, such"
            " as LlamaForCausalLM; a model without a cache runs under a plan without one"
        )
    return decoder


def _layout(
    model: nn.Module, decoder: nn.Module, plan: Plan
) -> tuple[set[int], dict[int, int], dict[int, Any], dict[int, str]]:
    """Cache indices of the skipped layers, of those that read another's cache or split it; names of all."""
    modules = dict(model.named_modules())
    inside = {id(module) for module in decoder.modules()}
    indices: dict[str, int] = {}
    absent: set[int] = set()
    follows: dict[int, int] = {}
    splits: dict[int, Any] = {}
    for name, stack, entry in _entries(plan):
        layer = modules.get(entry.path)
        kind = type(layer).__name__
        if layer is None or (entry.kind and entry.kind != kind):
            has = f"{entry.path!r} is a {kind}" if layer is not None else f"it has no module {entry.path!r}"
            raise PlanError(f"the plan does not fit {type(model).__name__}: {has}")
        if id(layer) not in inside:
            continue  # an encoder's layer: it holds no cache
        indices[entry.path] = index = _index(layer, entry.path)
        if entry.decision is not None and name in _SKIPPING:
            absent.add(index)
        elif entry.decision is not None and name == _SPLITTING:
            splits[index] = entry.decision
        elif entry.decision is not None:
            follows[index] = indices[stack.layers[entry.decision].path]
    return absent, follows, splits, {index: f"layer {index} ({path})" for path, index in indices.items()}


def _entries(plan: Plan) -> Iterator[tuple[str, PlannedStack, Entry]]:
    """(pass name, stack, layer) in order, of the passes that change caches."""
    for section in plan.sections:
        if section.name in (*_SKIPPING, _SHARING, _SPLITTING):
            yield from ((section.name, stack, entry) for stack in section.stacks for entry in stack.layers)


def _index(layer: nn.Module, path: str) -> int:
    """The cache index of a layer: the `layer_idx` of the modules under it."""
    indices = (getattr(module, "layer_idx", None) for module in layer.modules())
    found = sorted({index for index in indices if isinstance(index, int)})
    if len(found) != 1:
        has = f"has {len(found)} cache indices {found}" if found else "has no cache index"
        raise PlanError(f"{path!r} {has}: its modules must have one `layer_idx`, as in transformers")
    return found[0]
