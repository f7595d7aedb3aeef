"""A pass of one's own, run and tested. docs/adding-a-pass.md explains it line by line."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import effopt
from effopt import Emit, Example, Match, Rewrite, Stage
from effopt.testing import check_pass


@dataclass(frozen=True)
class MergeReluPair(Rewrite):
    """Merge the two halves of an absolute value: relu(x) + relu(-x)  =>  abs(x).

    Exact. Source: the two phases of Shang et al. 2016, arXiv:1603.05201.
    """

    name: ClassVar[str] = "merge-relu-pair"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def pattern(self, op: Any, x: Any) -> Any:
        return op.add(op.relu(x), op.relu(op.neg(x)))

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (torch.ops.aten.relu.default,)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return emit(torch.ops.aten.abs.default, m.x)

    def samples(self):
        yield Example(lambda x: x.relu() + (-x).relu(), (torch.randn(3, 5),))

    def refusals(self):
        different = (torch.randn(3), torch.randn(3))
        yield Example(lambda x, y: x.relu() + (-y).relu(), different, "in one place and")


def magnitude(x: torch.Tensor) -> torch.Tensor:
    return (x.relu() + (-x).relu()).sum(-1)


if __name__ == "__main__":
    with torch.no_grad():
        options = {"passes": [MergeReluPair], "lowering": "eager"}
        report = effopt.explain(magnitude, torch.randn(4, 8), options=options)
    print(report)
    assert report.counts["merge-relu-pair"] == 1
    print(check_pass(MergeReluPair))
