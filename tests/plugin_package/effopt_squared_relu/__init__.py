"""Squared ReLU as one op: a plugin of effopt with a pass, an op and a lowering of its own."""

from __future__ import annotations

from collections.abc import Sequence

from effopt import hookimpl
from effopt.backends.base import Lowering
from effopt.graph.ops.base import Op
from effopt.passes.base import Pass
from effopt_squared_relu.kernel import CLAMPED
from effopt_squared_relu.op import squared_relu
from effopt_squared_relu.recognize_squared_relu import RecognizeSquaredReLU


@hookimpl
def effopt_passes() -> Sequence[type[Pass]]:
    """The one pass."""
    return (RecognizeSquaredReLU,)


@hookimpl
def effopt_ops() -> Sequence[Op]:
    """The op that it emits."""
    return (squared_relu,)


@hookimpl
def effopt_lowerings() -> Sequence[Lowering]:
    """A faster way to run it than its reference."""
    return (CLAMPED,)
