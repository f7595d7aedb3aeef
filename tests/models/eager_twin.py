"""The same transformations done by hand on a model's modules, in eager PyTorch: the oracle of lossy passes.

Written from the techniques' definitions and not from the passes: modules are removed from their lists,
weights are overwritten with their rounded values, keys and values are taken from another layer's modules.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KEYS_AND_VALUES = {"k_proj", "v_proj", "k", "v", "key", "value"}
NORMS_OF_KEYS = {"k_norm", "v_norm"}
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")


def stacks_of(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of several modules: a model's layers; two of them in an encoder-decoder."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found.append((name, module))
    return found


def evenly_spaced(count: int, keep: float) -> list[int]:
    """Positions of the layers that stay: the first, the last, and the others spread evenly between them."""
    left = max(min(count, 2), round(keep * count))
    return [0] if left == 1 else [round(i * (count - 1) / (left - 1)) for i in range(left)]


def skip_layers(model: nn.Module, keep: float) -> None:
    """Remove layers from each list, and number those that stay anew."""
    kept: dict[int, list[int]] = {}
    for _, layers in stacks_of(model):
        stay = evenly_spaced(len(layers), keep)
        kept[len(layers)] = stay
        rest = [layers[i] for i in stay]
        del layers[len(rest) :]
        for position, layer in enumerate(rest):
            layers[position] = layer
            for part in layer.modules():
                if isinstance(getattr(part, "layer_idx", None), int):
                    part.layer_idx = position
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        types = getattr(config, "layer_types", None)
        if types:
            config.layer_types = [types[i] for i in kept[len(types)]]
        for name in COUNTS:
            if isinstance(getattr(config, name, None), int) and getattr(config, name) in kept:
                setattr(config, name, len(kept[getattr(config, name)]))


class Recalled(nn.Module):
    """Gives what another module gave in the same forward pass."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.last: Tensor | None = None
        source.register_forward_hook(self._note)

    def _note(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.last = output

    def forward(self, _: Tensor) -> Tensor:
        assert self.last is not None
        return self.last


class QueryOfOne(nn.Module):
    """GPT-2's packed projection: the query of this layer, key and value of another."""

    def __init__(self, own: nn.Module, source: nn.Module) -> None:
        super().__init__()
        self.own, self.recalled = own, Recalled(source)

    def forward(self, x: Tensor) -> Tensor:
        mine, theirs = self.own(x), self.recalled(x)
        third = mine.shape[-1] // 3
        return torch.cat([mine[..., :third], theirs[..., third:]], -1)


def share_keys_and_values(model: nn.Module, group: int) -> None:
    """In each group of adjacent layers the later ones take keys and values from the first."""
    for _, layers in stacks_of(model):
        for position, layer in enumerate(layers):
            first = layers[position - position % group]
            if first is not layer:
                _take_from(layer, first)


def _take_from(layer: nn.Module, first: nn.Module) -> None:
    for name, module in list(layer.named_modules()):
        leaf = name.rpartition(".")[2]
        if leaf in KEYS_AND_VALUES:
            layer.set_submodule(name, Recalled(first.get_submodule(name)))
        elif leaf in NORMS_OF_KEYS:
            layer.set_submodule(name, first.get_submodule(name))
        elif leaf == "c_attn":
            layer.set_submodule(name, QueryOfOne(module, first.get_submodule(name)))


def rounded(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """`weight` `[n, k]` after rounding to `bits` with a scale a group, and the scales `[n, groups]`."""
    k = weight.shape[1]
    size = group or k
    pieces, scales = [], []
    for start in range(0, k, size):
        w = weight[:, start : start + size].to(torch.promote_types(weight.dtype, torch.float32))
        if symmetric:
            scale = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        else:
            low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
        scale = scale.to(weight.dtype).to(w.dtype)
        scale = torch.where(scale == 0, 1.0, scale)
        if symmetric:
            codes = (w / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        else:
            zero = (-low / scale).round().clamp(0, 2**bits - 1)
            codes = ((w / scale).round() + zero).clamp(0, 2**bits - 1) - zero
        pieces.append((codes * scale).to(weight.dtype))
        scales.append(scale)
    return torch.cat(pieces, 1), torch.cat(scales, 1)


class Int8(nn.Module):
    """A linear layer on integers: tokens and rows of the weight rounded to 8 bits, sums in int64."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        values, scale = rounded(weight, 8, 0, True)
        self.scale = scale[:, 0].float()
        self.codes = (values.double() / scale.double()).round().long()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        f = x.float()
        scale = f.abs().amax(-1, keepdim=True) * (1.0 / 127.0)
        scale = torch.where(scale == 0, 1.0, scale)
        codes = (f / scale).round().clamp(-127, 127).long()
        out = (codes @ self.codes.T).float() * scale * self.scale
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)


def quantize(model: nn.Module, bits: int, group: int, symmetric: bool, activations: bool) -> None:
    """Round the weight of every linear layer; with `activations`, replace it by one on integers."""
    for module in list(model.modules()):
        if not isinstance(module, (nn.Linear, Conv1D)) and not type(module).__name__.endswith("Router"):
            continue
        stored: Tensor = module.weight.detach()
        weight = stored.T if isinstance(module, Conv1D) else stored
        if group > weight.shape[1]:
            continue
        is_plain = isinstance(module, (nn.Linear, Conv1D))
        if activations and is_plain:
            bias = getattr(module, "bias", None)
            # Only the function: what other layers took from this module by a hook, they still take.
            module.forward = Int8(weight, None if bias is None else bias.detach()).forward
            continue
        value = rounded(weight, bits, group, symmetric)[0]
        module.weight = nn.Parameter(value.T.contiguous() if isinstance(module, Conv1D) else value)


def twin_of(
    model: nn.Module,
    *,
    keep: float = 1.0,
    share: int = 1,
    bits: int = 0,
    group: int = 0,
    symmetric: bool = True,
    activations: bool = False,
) -> nn.Module:
    """A transformed copy of `model`: layers first, then keys and values, then weights."""
    twin = copy.deepcopy(model)
    if keep < 1:
        skip_layers(twin, keep)
    if share > 1:
        share_keys_and_values(twin, share)
    if bits:
        quantize(twin, bits, group, symmetric, activations)
    return twin


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    return float((got - want).abs().max() / want.abs().max()) if want.numel() else math.nan
