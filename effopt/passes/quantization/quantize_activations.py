"""Multiply in 8-bit integers: quantise the input of a linear layer whose weight has 8 bits.

    quantized_linear(x, packed, scale, None, b)  =>  int8_linear(x, packed, scale, b)

Lossy: each token is rounded to 255 levels of its largest value, found when it runs; tokens with outliers lose
most. There is no knob but to leave layers out (`quantize-weights{exclude=...}` keeps them in floating point).
Needs no training and no data; inference only, as its weights. The products are summed exactly. Saves no
bytes beyond the weights', and doubles the arithmetic rate where the target multiplies bytes.
Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.1 (vector-wise, without outliers apart).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from effopt.graph import ops
from effopt.graph.pattern import OpBuilder
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.round_to_nearest import quantize_rows
from effopt.graph.values import shape_of
from effopt.passes.base import Example, Rewrite, Stage, option

_MOST_TERMS = 2**31 // (127 * 128)
"""Products of two codes whose sum an int32 holds whatever they are."""


@dataclass(frozen=True)
class QuantizeActivations(Rewrite):
    """A linear layer with 8-bit weights, one scale a row and no zero, multiplies integers."""

    name: ClassVar[str] = "quantize-activations"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("quantize-weights",)

    bits: int = option(8, "bits of an activation", choices=(8,))

    def pattern(
        self, op: OpBuilder, x: Any, packed: Any, scale: Any, zero: Any, bias: Any, width: Any, group: Any
    ) -> Any:
        return op["effopt.quantized_linear"](x, packed, scale, zero, bias, bits=width, group=group)

    def legal(self, m: Match) -> None:
        at = m.root
        require(m.width == 8, f"its weight has {m.width} bits; it takes quantize-weights{{bits=8}}", at)
        groups = shape_of(m.scale)[-1]
        require(
            groups == 1, f"its weight has {groups} scales a row; it takes quantize-weights{{group=0}}", at
        )
        require(m.zero is None, "its weight has zeros; it takes quantize-weights{symmetric=true}", at)
        k = shape_of(m.packed)[-1]
        require(k <= _MOST_TERMS, f"{k} products a sum; an int32 holds {_MOST_TERMS} for certain", at)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return emit(ops.int8_linear, m.x, m.packed, m.scale, m.bias)

    def samples(self) -> Iterable[Example]:
        yield _example(8)
        yield _example(8, torch.randn(12))

    def refusals(self) -> Iterable[Example]:
        yield _example(4, reason="has 4 bits")
        yield _example(8, group=8, reason="has 3 scales a row")
        yield _example(8, symmetric=False, reason="has zeros")


def _example(
    bits: int,
    bias: torch.Tensor | None = None,
    group: int = 0,
    symmetric: bool = True,
    reason: str = "",
) -> Example:
    x, weight = torch.randn(2, 5, 24), torch.randn(12, 24)
    packed, scale, *zero = quantize_rows(weight, bits=bits, group=group, symmetric=symmetric)
    given = [t for t in (x, packed, scale, *zero, bias) if t is not None]

    def run(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *rest: torch.Tensor) -> Any:
        end = rest[0] if bias is not None else None
        at = rest[0] if not symmetric else None
        return torch.ops.effopt.quantized_linear(x, packed, scale, at, end, bits=bits, group=group)

    return Example(run, tuple(given), reason, training=False)
