"""Cleanup: what canonicalisation left without a use, without an effect, or twice."""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.cleanup.eliminate_common_subexpressions import EliminateCommonSubexpressions
from effopt.passes.cleanup.eliminate_dead_code import EliminateDeadCode
from effopt.passes.cleanup.remove_no_ops import RemoveNoOps

PASSES: tuple[type[Pass], ...] = (RemoveNoOps, EliminateCommonSubexpressions, EliminateDeadCode)
