"""Recognise squared ReLU.

    relu(x) ** 2,  relu(x) * relu(x)  =>  squared_relu(x)

Exact. No training. Saves one write and one read of x.
Source: So et al. 2021, arXiv:2109.08668.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from effopt.graph.pattern import OpBuilder, any_of
from effopt.graph.rewrite import Emit, Match
from effopt.passes.base import Example, Rewrite, Stage
from effopt_squared_relu.op import squared_relu


@dataclass(frozen=True)
class RecognizeSquaredReLU(Rewrite):
    """See the module."""

    name: ClassVar[str] = "recognize-squared-relu"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def pattern(self, op: OpBuilder, x: Any) -> Any:
        rectified = op.relu(x)
        return any_of(op.pow(rectified, 2), op.mul(rectified, rectified), op.square(rectified))

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (torch.ops.aten.relu.default,)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return emit(squared_relu, m.x)

    def samples(self) -> Iterable[Example]:
        yield Example(lambda x: x.relu().pow(2), (torch.randn(3, 5),))
        yield Example(lambda x: x.relu() * x.relu(), (torch.randn(3, 5),))

    def refusals(self) -> Iterable[Example]:
        yield Example(lambda x: x.relu().pow(3), (torch.randn(3, 5),), reason="expected 2")
