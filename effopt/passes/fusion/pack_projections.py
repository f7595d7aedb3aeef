"""Pack linear layers that read one input into one matrix product.

    linear(x, wq, bq), linear(x, wk, bk), linear(x, wv, bv)
      =>  y = linear(x, cat(wq, wk, wv), cat(bq, bk, bv)); y[..., :nq], y[..., nq:nq+nk], y[..., nq+nk:]

Exact: each element is the same dot product. Inference only: in training the weights must stay leaves.
Reads `x` once and launches one product instead of several; holds a second copy of the packed weights,
so it runs only when asked for. The copy is made once and again whenever a weight changes.
Source: Shoeybi et al. 2019, arXiv:1909.08053, whose code takes query, key and value as one product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from effopt.graph import ops
from effopt.graph.rewrite import Emit, PassResult
from effopt.graph.values import shape_of, val
from effopt.passes.base import Context, Example, GraphPass, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class PackProjections(GraphPass):
    """A graph pass, for no pattern can say "every linear layer that reads this value"."""

    name: ClassVar[str] = "pack-projections"
    stage: ClassVar[Stage] = Stage.FUSE
    default: ClassVar[bool] = False
    provides: ClassVar[tuple[str, ...]] = ("replaced weights",)

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Pack each group of layers that share input, dtype, and having a bias or not."""
        result = PassResult()
        for layers in _by_input(module):
            groups: dict[tuple[torch.dtype, bool], list[Node]] = {}
            for layer in layers:
                reason = _refusal(layer, context)
                if reason is not None:
                    result.reject(self.name, layer, reason)
                else:
                    groups.setdefault((val(layer.args[1]).dtype, _bias(layer) is not None), []).append(layer)
            for group in groups.values():
                if len(group) > 1:
                    _pack(group, module, context)
                    result.apply(self.name, "linear", group[0], f"packed {len(group)}")
                elif len(groups) > 1:
                    result.reject(
                        self.name, group[0], "the other layers on its input differ in dtype or bias"
                    )
        return result

    def samples(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 24)
        yield Example(_Projections((16, 8, 8), bias=False), (x,), training=False)
        yield Example(_Projections((16, 8, 8), bias=True), (x,), training=False)

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 24)
        yield Example(_Projections((16, 8), bias=False), (x,), "must stay leaves", training=True)
        yield Example(
            lambda x, a, b: torch.nn.functional.linear(x, a) - torch.nn.functional.linear(x, b),
            (x, torch.randn(8, 24), torch.randn(8, 24)), "not a parameter", training=False,
        )  # fmt: skip


def _by_input(module: GraphModule) -> list[list[Node]]:
    """The linear layers of each input that has several, in graph order."""
    sharing: dict[Node, list[Node]] = {}
    for layer in module.graph.find_nodes(op="call_function", target=_aten.linear.default):
        sharing.setdefault(layer.args[0], []).append(layer)
    return [layers for layers in sharing.values() if len(layers) > 1]


def _bias(layer: Node) -> Node | None:
    return layer.args[2] if len(layer.args) > 2 else None  # type: ignore[return-value]


def _refusal(layer: Node, context: Context) -> str | None:
    if context.training:
        return "training: the weights must stay leaves that the optimizer updates"
    if not context.weights.is_weight(layer.args[1]):
        return f"its weight, {layer.args[1]}, is not a parameter of the model"
    if _bias(layer) is not None and not context.weights.is_weight(_bias(layer)):
        return f"its bias, {_bias(layer)}, is not a parameter of the model"
    if len(shape_of(layer.args[1])) != 2 or any(type(n) is not int for n in shape_of(layer.args[1])):
        return f"its weight is {list(shape_of(layer.args[1]))}, not [n, k] of known sizes"
    return None


def _pack(group: Sequence[Node], module: GraphModule, context: Context) -> None:
    first = group[0]
    weights = [layer.args[1] for layer in group]
    biases = [bias for layer in group if (bias := _bias(layer)) is not None]
    operands = [context.weights.derive(module, "packed rows", _stacked, *weights)]  # type: ignore[arg-type]
    if biases:
        operands.append(context.weights.derive(module, "packed rows", _stacked, *biases))
    emit = Emit(module.graph, first, first, PackProjections.name)
    packed = emit(ops.linear, first.args[0], *operands)
    ends = list(itertools.accumulate(shape_of(w)[0] for w in weights))
    parts = [emit(_aten.slice.Tensor, packed, -1, a, b) for a, b in itertools.pairwise([0, *ends])]
    for layer, part in zip(group, parts, strict=True):
        layer.replace_all_uses_with(part)
        module.graph.erase_node(layer)


def _stacked(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, 0)


class _Projections(torch.nn.Module):
    """Linear layers of `sizes` on one input of 24 features."""

    def __init__(self, sizes: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(24, n, bias=bias) for n in sizes)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x).cos() for layer in self.layers]
