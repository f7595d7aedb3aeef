"""Passes that put something else in the place of an attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from effopt.graph import ops
from effopt.graph.ops.attention import OPTIONS
from effopt.graph.pattern import Capture, OpBuilder, tensor
from effopt.passes.base import Rewrite, Stage


@dataclass(frozen=True)
class AttentionPass(Rewrite):
    """Matches each canonical attention: `q`, `k`, `v` and, by name, all options."""

    stage: ClassVar[Stage] = Stage.ATTENTION

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (ops.attention.overload,)

    def pattern(self, op: OpBuilder, q: Any, k: Any, v: Any) -> Any:
        options = {name: Capture(name) for name in OPTIONS}
        return op["effopt.attention"](tensor(q), tensor(k), tensor(v), **options)
