"""Keep the weights of linear layers as small integers.

    linear(x, w, b)    =>  quantized_linear(x, packed, scale, zero, b)      packed, scale, zero derived from w
    embedding(w, ids)  =>  quantized_embedding(ids, packed, scale, zero)    with embeddings=true

Lossy: `bits`, `group` and `symmetric` trade perplexity for bytes; a weight moves by half a step of its group
at most. Needs no training and no data; inference only. At 4 bits in groups of 128 a bfloat16 layer takes
0.26x of its bytes, and reads as much less for each token; `release_weights` frees the original. A tied head
has codes of its own unless the embedding is quantised too.
Source: Yao et al. 2022, arXiv:2206.01861 (weights rounded to nearest, with a scale for each group).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from effopt.graph import ops
from effopt.graph.analyses.weight_source import WeightSource, layers_with_weights, weight_source
from effopt.graph.layer_globs import is_named, strangers
from effopt.graph.rewrite import Emit, PassResult, require
from effopt.graph.round_to_nearest import quantize_rows, quantized_bytes
from effopt.graph.values import is_floating, shape_of, val
from effopt.passes.base import Context, Example, Stage, option
from effopt.passes.site import Site, SitePass

_EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True)
class QuantizeWeights(SitePass):
    """A site is a layer with a weight. No pattern: a shared weight is quantised once for all its readers."""

    name: ClassVar[str] = "quantize-weights"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    provides: ClassVar[tuple[str, ...]] = ("replaced weights",)
    alternatives: ClassVar[tuple[str, ...]] = (f"{name}{{bits=8}}", f"{name}{{bits=4,group=32}}")

    bits: int = option(8, "bits of a weight", choices=(4, 8))
    group: int = option(0, "weights of a row that share a scale; 0 for the whole row", min=0)
    symmetric: bool = option(True, "the range of a group is the same on both sides of 0, and has no zero")
    include: str = option("*", "layer paths to quantise: globs, `|` between them")
    exclude: str = option("", "layer paths to leave as they are: globs, `|` between them")
    embeddings: bool = option(False, "quantise embedding tables too")

    def sites(self, module: GraphModule, context: Context, result: PassResult) -> Sequence[Site]:
        """The layers with a weight. One without a module goes by the name of its parameter."""
        layers, others = layers_with_weights(module.graph, context.weights)
        for glob, near in strangers(f"{self.include}|{self.exclude}", layers.values()):
            result.reject(self.name, next(iter(layers)), f"no layer of this graph is {glob}; near is {near}")
        for node, what in others:
            why = f"a weight of {what}: only linear layers and embeddings are quantised"
            result.reject(self.name, node, why)
        found = []
        for node, path in layers.items():
            if weight_source(_weight(node), context.weights) is not None:
                found.append(Site(node, path, f"{_kind(node)} {list(shape_of(_weight(node)))}"))
            elif node.target is not _EMBEDDING or self.embeddings:
                why = f"its weight, {_weight(node)}, is not a parameter of the model, or an inference one"
                result.reject(self.name, node, why)
        return found

    def decide(self, site: Site, context: Context) -> Any:
        """The form of the codes: `bits`, `group` and `symmetric`."""
        node, path = site.node, site.path
        form = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        require(node.target is not _EMBEDDING or self.embeddings, "", node)
        require(not is_named(path, self.exclude), f"exclude={self.exclude} names {path}", node)
        require(is_named(path, self.include), f"include={self.include} does not name {path}", node)
        _legal(node, form, context)
        return form

    def enact(
        self, site: Site, decision: Any, module: GraphModule, context: Context, result: PassResult
    ) -> None:
        """Read codes in place of the weight."""
        node, source = site.node, _legal(site.node, decision, context)
        before, after = weight_bytes = _bytes(node, decision)
        kind = " ".join([self.name, *(f"{k}={v}" for k, v in decision.items()), source.describe()]).strip()
        make = source.then(functools.partial(quantize_rows, **decision))
        packed, scale, *zero = context.weights.derive(module, kind, make, source.parameter)
        emit = Emit(module.graph, node, node, self.name)
        operands = packed, scale, zero[0] if zero else None
        form = {"bits": decision["bits"], "group": decision["group"]}
        if node.target is _EMBEDDING:
            width = shape_of(_weight(node))[1]
            made = emit(ops.quantized_embedding, node.args[1], *operands, **form, width=width)
        else:
            bias = node.args[2] if len(node.args) > 2 else None
            made = emit(ops.quantized_linear, node.args[0], *operands, bias, **form)
        node.replace_all_uses_with(made)
        is_tied = _kind(node) == "linear" and any(u.target is _EMBEDDING for u in source.parameter.users)
        note = "; the embedding that it is tied to keeps the original" if is_tied else ""
        note = f"{before} -> {after} bytes{note}"
        result.apply(self.name, _kind(node), node, note, weight_bytes=weight_bytes)
        module.graph.erase_node(node)

    def samples(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 24)
        yield Example(nn.Linear(24, 12), (x,), training=False)
        two = nn.Sequential(nn.Linear(24, 48, bias=False), nn.GELU(), nn.Linear(48, 24))
        yield Example(two, (x,), training=False)

    def refusals(self) -> Iterable[Example]:
        x, linear = torch.randn(2, 5, 24), nn.functional.linear
        yield Example(nn.Linear(24, 12), (x,), "must stay leaves", training=True)
        yield Example(
            lambda x, w: linear(x, w), (x, torch.randn(12, 24)), "is not a parameter", training=False
        )
        yield Example(nn.Linear(1, 12), (x[..., :1],), "nothing is saved", training=False)
        yield Example(nn.Conv1d(5, 4, 3), (x,), "only linear layers", training=False)


def _kind(node: Node) -> str:
    return "embedding" if node.target is _EMBEDDING else "linear"


def _legal(node: Node, form: Any, context: Context) -> WeightSource:
    weight = _weight(node)
    reason = "training: the weights must stay leaves that the optimizer updates"
    require(not context.training, reason, node)
    source = weight_source(weight, context.weights)
    assert source is not None, "a site has a parameter"
    shape = shape_of(weight)
    is_known = len(shape) == 2 and all(type(size) is int for size in shape)
    require(is_known, f"its weight is {list(shape)}, not [n, k] of known sizes", node)
    require(is_floating(weight), f"its weight is {val(weight).dtype}, not floating", node)
    k, group = shape[1], form["group"]
    require(group <= k, f"group={group} is more than a row has; take group={k} or group=0", node)
    before, after = _bytes(node, form)
    require(after < before, f"{after} bytes quantised, {before} as it is: nothing is saved", node)
    return source


def _bytes(node: Node, form: Any) -> tuple[int, int]:
    (n, k), size = shape_of(_weight(node)), val(_weight(node)).element_size()
    return n * k * size, quantized_bytes(n, k, size, **form)


def _weight(node: Node) -> Node:
    return node.args[0 if node.target is _EMBEDDING else 1]  # type: ignore[return-value]
