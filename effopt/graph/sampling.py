"""Values for the inputs of a region: ordinary ones, and those on which look-alikes part.

Shapes, dtypes and strides are those of the graph, expanded (stride 0) dimensions included. Integers stay
within the range of what they index. Masks hold what models put into masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph.ops.base import bind_schema, hint
from effopt.graph.region import Region
from effopt.graph.values import val

_TRANSPARENT = frozenset(
    "_to_copy to clone contiguous view reshape expand unsqueeze squeeze slice transpose permute where "
    "lift_fresh_copy detach alias masked_fill".split()
)
_SOFTMAX = frozenset("softmax _softmax amax max exp logsumexp log_softmax _safe_softmax".split())
_MASK_ARGUMENT = {"scaled_dot_product_attention": "attn_mask", "attention": "bias"}
# Op -> (argument that is indexed, argument that holds the indices).
_INDEXED = {
    "embedding": ("weight", "indices"),
    "gather": ("self", "index"),
    "index_select": ("self", "index"),
    "index_copy": ("self", "index"),
    "index_add": ("self", "index"),
    "scatter": ("self", "index"),
    "scatter_add": ("self", "index"),
    "take_along_dim": ("self", "indices"),
}


@dataclass(frozen=True)
class Draw:
    """One way to fill all inputs."""

    name: str
    scale: float = 1.0
    zero_row: bool = False
    """Whether one row of each floating input is zero."""
    mask: str = "none"
    """Contents of mask-like inputs: `none` (ordinary numbers), `keys`, `rows` (whole rows too, by the least
    finite number), or `infinite rows` (whole rows by -inf)."""


ORDINARY = Draw("ordinary values")
DRAWS = (
    ORDINARY,
    Draw("small values and a row of zeros", scale=1e-3, zero_row=True),
    Draw("large values", scale=8.0),
)
MASK_DRAWS = (
    Draw("masked keys", mask="keys"),
    Draw("fully masked rows", mask="rows"),
    Draw("rows masked by -inf", mask="infinite rows"),
)


@dataclass(frozen=True)
class Sampler:
    """How to fill each input of one region."""

    inputs: tuple[Node, ...]
    masks: frozenset[Node]
    """Inputs that are added to scores, or select among them."""
    index_bound: Mapping[Node, int]
    decays: frozenset[Node] = frozenset()
    """Inputs that are logarithms of a decay."""
    size: Callable[[Any], int] = hint

    @property
    def draws(self) -> tuple[Draw, ...]:
        """The draws that say something about this region."""
        return (*DRAWS, *MASK_DRAWS) if self.masks else DRAWS

    def fill(self, draw: Draw, generator: torch.Generator) -> list[Any]:
        """One value for each input."""
        return [self._one(node, draw, generator) for node in self.inputs]

    def _one(self, node: Node, draw: Draw, generator: torch.Generator) -> Any:
        value = val(node)
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            return self.size(value)
        if not isinstance(value, Tensor):
            return value.node.hint if isinstance(value, (torch.SymFloat, torch.SymBool)) else value
        sizes = [self.size(s) for s in value.shape]
        strides = [self.size(s) for s in value.stride()]
        compact = [1 if stride == 0 else s for s, stride in zip(sizes, strides, strict=True)]
        if value.dtype == torch.bool:
            drawn = _booleans(compact, draw, generator)
        elif not (value.dtype.is_floating_point or value.dtype.is_complex):
            drawn = torch.randint(
                0, self.index_bound.get(node, 4), compact, generator=generator, dtype=value.dtype
            )
        elif node in self.masks and draw.mask != "none":
            drawn = _additive_mask(compact, value.dtype, draw, generator)
        else:
            drawn = _numbers(compact, value.dtype, draw, generator)
            if node in self.decays and draw.scale >= 1.0:
                # Powers that grow from token to token overflow, and where they do so hangs on the order of
                # sums. Both signs are in the draw of small values.
                drawn = -drawn.abs()
        return with_strides(drawn.to(value.device), sizes, strides)


def _numbers(sizes: Sequence[int], dtype: torch.dtype, draw: Draw, generator: torch.Generator) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    # Scores of 3 * 3 in 8 bits are off by some percent before a softmax; of 8 * 8 nothing is left to compare.
    most = 3.0 if dtype in (torch.bfloat16, torch.float16) else draw.scale
    drawn = torch.randn(sizes, generator=generator, dtype=wide) * min(draw.scale, most)
    if draw.zero_row and drawn.dim() > 1:
        drawn.select(-2, 0).zero_()
    return drawn.to(dtype)


def _booleans(sizes: Sequence[int], draw: Draw, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(sizes, generator=generator) > 0.3
    if drawn.dim() and drawn.numel():
        drawn[..., 0] = True
        if draw.mask in ("rows", "infinite rows"):
            _first_row(drawn).fill_(False)
    return drawn


def _additive_mask(
    sizes: Sequence[int], dtype: torch.dtype, draw: Draw, generator: torch.Generator
) -> Tensor:
    drawn = torch.zeros(sizes, dtype=dtype)
    if drawn.dim() and drawn.numel():
        kind = torch.randint(0, 4, sizes, generator=generator)
        drawn[kind == 1] = torch.finfo(dtype).min
        drawn[kind == 2] = -torch.inf
        drawn[..., 0] = 0.0
        if draw.mask in ("rows", "infinite rows"):
            _first_row(drawn).fill_(torch.finfo(dtype).min if draw.mask == "rows" else -torch.inf)
    return drawn


def _first_row(drawn: Tensor) -> Tensor:
    return drawn.select(-2, 0) if drawn.dim() > 1 else drawn


def with_strides(compact: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """`compact`, whose stride-0 dimensions have size 1, in the given sizes and strides."""
    dense = compact.expand(sizes)
    if list(dense.stride()) == list(strides) or not compact.numel():
        return dense
    extent = 1 + sum((s - 1) * st for s, st in zip(compact.shape, strides, strict=True))
    storage = compact.new_zeros(extent)
    inner = [st if st else 1 for st in strides]
    storage.as_strided(compact.shape, inner).copy_(compact)
    return storage.as_strided(list(sizes), list(strides))


def sampler_of(region: Region, size: Callable[[Any], int] = hint) -> Sampler:
    """How to fill the inputs of `region`, read off the way in which its nodes use them."""
    inside = set(region.inputs)
    masks: set[Node] = set()
    decays: set[Node] = set()
    bounds: dict[Node, int] = {}
    for node in region.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.split("::")[1]
        bound = bind_schema(node.target, node.args, node.kwargs)
        if name in _SOFTMAX and node.args:
            masks.update(_leaves(node.args[0], inside, added=False))
        elif name in _MASK_ARGUMENT:
            masks.update(_leaves(bound[_MASK_ARGUMENT[name]], inside, added=True))
        if name == "linear_attention":
            decays.update(_leaves(bound["decay"], inside, added=True))
        if "mask" in bound:
            masks.update(_leaves(bound["mask"], inside, added=True))
        if name == "where":
            masks.update(_leaves(bound.get("condition"), inside, added=True))
        for source, index, limit in _index_uses(name, bound, size):
            for leaf in _leaves(index, inside, added=True):
                bounds[leaf] = min(limit, bounds.get(leaf, limit)) if source is not None else limit
    kept = frozenset(m for m in masks if isinstance(val(m), Tensor) and _may_mask(val(m)))
    return Sampler(region.inputs, kept, bounds, frozenset(decays), size)


def _may_mask(value: Tensor) -> bool:
    return value.dtype == torch.bool or value.dtype.is_floating_point


def _leaves(value: Any, inside: set[Node], added: bool) -> set[Node]:
    """Inputs reached from `value` through copies, views and additions; at least one unless `added`."""
    found: set[Node] = set()
    pending, seen = [(value, added)], set()
    while pending:
        current, was_added = pending.pop()
        if not isinstance(current, Node) or (current, was_added) in seen:
            continue
        seen.add((current, was_added))
        if current in inside:
            if was_added:
                found.add(current)
        elif isinstance(current.target, torch._ops.OpOverload):
            name = current.target._schema.name.split("::")[1]
            if name in _TRANSPARENT:
                pending.extend((a, was_added) for a in current.all_input_nodes)
            elif name == "add":
                pending.extend((a, True) for a in current.all_input_nodes)
            elif name in ("logical_and", "bitwise_and", "__and__", "logical_not", "bitwise_not"):
                pending.extend((a, was_added) for a in current.all_input_nodes)
    return found


def _index_uses(
    name: str, bound: Mapping[str, Any], size: Callable[[Any], int]
) -> list[tuple[Any, Any, int]]:
    """(source, indices, number of valid indices) of each index operand of a call."""
    if name in _INDEXED:
        source, index = (bound[key] for key in _INDEXED[name])
        dim = bound.get("dim", 0) if name != "embedding" else 0
        shape = val(source).shape
        return [(source, index, size(shape[dim]) if len(shape) else 1)]
    if name in ("index", "index_put"):
        source = bound["self"]
        places = enumerate(bound["indices"])
        return [(source, index, size(val(source).shape[i])) for i, index in places if index is not None]
    return []
