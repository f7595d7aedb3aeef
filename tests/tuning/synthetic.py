"""A model and two lossy passes whose cost is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import effopt
from effopt.graph.analyses.layers import Stack
from effopt.graph.provenance import layer_of
from effopt.graph.rewrite import Emit, PassResult, require
from effopt.graph.values import shape_of
from effopt.passes.base import Context

_aten = torch.ops.aten


class Term(nn.Module):
    """Adds `amount` to the logit of token 0, whatever it is given."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.bias.copy_(torch.tensor([amount, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Terms(nn.Module):
    """Two tokens, whose logits differ by the sum of the amounts."""

    def __init__(self, *amounts: float) -> None:
        super().__init__()
        self.amounts = amounts
        self.embed = nn.Embedding.from_pretrained(torch.zeros(2, 2))
        self.layers = nn.ModuleList(Term(amount) for amount in amounts)
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def kl_of(amounts: Sequence[float], left: Sequence[float]) -> float:
    """KL(with `amounts` || with `left`) of one token."""
    p, q = (1 / (1 + math.exp(-sum(terms))) for terms in (amounts, left))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@dataclass(frozen=True)
class FadeTerms(effopt.SitePass):
    """Makes a constant of each linear layer: `keep` times its bias."""

    name: ClassVar[str] = "fade-terms"
    stage: ClassVar[effopt.Stage] = effopt.Stage.QUANTIZE
    alternatives: ClassVar[tuple[str, ...]] = ("fade-terms", "fade-terms{keep=0.0}")

    keep: float = effopt.option(0.5, "share of the bias that stays", min=0, max=1)
    poison: str = effopt.option("", "path of a site that gives NaN")
    refuse: str = effopt.option("", "path of a site that refuses when it is to be changed")

    def sites(self, module: GraphModule, context: Context, result: PassResult) -> Sequence[effopt.Site]:
        linears = module.graph.find_nodes(op="call_function", target=_aten.linear.default)
        return [effopt.Site(node, layer_of(node), "linear") for node in linears]

    def decide(self, site: effopt.Site, context: Context) -> Any:
        factor = "nan" if site.path == self.poison else self.keep
        return {"keep": factor, "refuse": site.path == self.refuse}

    def enact(
        self, site: effopt.Site, decision: Any, module: GraphModule, context: Context, result: PassResult
    ) -> None:
        node, keep = site.node, float(decision["keep"])
        require(not decision["refuse"], "this one never works", node)
        emit = Emit(module.graph, node, node, self.name)
        shape = list(shape_of(node))
        if keep == 0:
            made = emit(_aten.full.default, shape, 0.0)
        else:
            made = emit(_aten.expand.default, emit(_aten.mul.Tensor, node.args[2], keep), shape)
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
        result.apply(self.name, "constant", node)


@dataclass(frozen=True)
class BypassTerms(effopt.RegionPass):
    """Leaves layers out, all but one of them."""

    name: ClassVar[str] = "bypass-terms"
    stage: ClassVar[effopt.Stage] = effopt.Stage.LAYERS
    alternatives: ClassVar[tuple[str, ...]] = ("bypass-terms",)

    def decide(self, stack: Stack, scores: Sequence[float] | None, result: PassResult) -> list[str]:
        return ["bypass"] * len(stack.layers)

    def enact(self, stack: Stack, decisions: Sequence[Any], graph: Graph, result: PassResult) -> None:
        entry = stack.layers[0].entry
        for layer, decision in zip(stack.layers, decisions, strict=True):
            if decision is None:
                entry = layer.exit
            else:
                layer.exit.replace_all_uses_with(entry)
                result.apply(self.name, "identity", layer.exit)


class Plugin:
    @effopt.hookimpl
    def effopt_passes(self) -> list[type[effopt.Pass]]:
        return [FadeTerms, BypassTerms]


PLUGINS = [Plugin()]
SPECS = ["fade-terms", "fade-terms{keep=0.0}", "bypass-terms"]


def left_of(amounts: Sequence[float], decisions: Mapping[tuple[str, int], Any]) -> list[float]:
    """What remains of the amounts: (pass, layer) -> decision."""
    left = []
    for number, amount in enumerate(amounts):
        if ("bypass-terms", number) in decisions:
            continue
        fade = decisions.get(("fade-terms", number))
        left.append(amount if fade is None else amount * float(fade["keep"]))
    return left
