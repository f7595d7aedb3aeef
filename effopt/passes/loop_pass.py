"""Passes that put one op in the place of an unrolled loop over time."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from effopt.graph.analyses.recurrences import Recurrence, recurrences
from effopt.graph.driver import apply_found
from effopt.graph.rewrite import Emit, Match, PassResult
from effopt.graph.values import shape_of
from effopt.passes.base import Context, GraphPass, Stage


@dataclass(frozen=True)
class LoopPass(GraphPass):
    """A graph pass, for no pattern can say "and so on for every step"."""

    stage: ClassVar[Stage] = Stage.CANONICALIZE
    after: ClassVar[tuple[str, ...]] = ("spell-einsum", "stack-before-pointwise")
    may_duplicate: ClassVar[bool] = True

    @abstractmethod
    def tells_of(self, rank: int) -> bool:
        """Whether misses with states of so many dimensions are this pass's to report, and no other's."""

    @abstractmethod
    def covered(self, found: Recurrence) -> tuple[Node, ...]:
        """Every call that the op takes the place of, whether or not the loop is one."""

    @abstractmethod
    def read(self, found: Recurrence) -> Any:
        """The operands of the op. Raises `Reject`."""

    @abstractmethod
    def write(self, emit: Emit, found: Recurrence, form: Any) -> tuple[Node, ...]:
        """Emit the op: what was collected, each tensor, and the last state."""

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Each loop that is a linear recurrence, and the op."""
        found = recurrences(module.graph)
        matches = [Match(r.last, self.covered(r), {"found": r}) for r in found.recurrences]
        result = apply_found(self, module, matches, context.approve)
        for miss in found.misses:
            if miss.node is not None and self.tells_of(len(shape_of(miss.state))):
                result.reject(self.name, miss.node, miss.reason)
        return result

    def legal(self, m: Match) -> None:
        m.once(self._form)

    def _form(self, m: Match) -> Any:
        return self.read(m.found)

    def outputs(self, m: Match) -> tuple[Node, ...]:
        """The collected read-outs, and the last state where it is read besides."""
        collected = tuple(output.collected.node for output in m.found.outputs)
        return (*collected, m.found.last) if m.found.reads_last else collected

    def rewrite(self, emit: Emit, m: Match) -> Any:
        emit.note = f"{m.found.steps} steps"
        return self.write(emit, m.found, m.once(self._form))[: len(self.outputs(m))]
