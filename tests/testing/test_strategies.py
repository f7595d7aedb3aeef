"""Drawn graphs run, shrink to one block, and drawn operands have the layout asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from torch import Tensor

from effopt.passes.base import Example
from effopt.testing import capture_example, disagreement, run_passes
from effopt.testing.strategies import BLOCKS, Block, Program, graphs, operands
from tests.plugins.planted import rule

aten = torch.ops.aten


@given(graphs())
def test_every_graph_runs(program: Program) -> None:
    result = program(*Program.inputs())
    assert result.shape == (2, 5, 8)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_simplest_graph_with_a_block_is_that_block(name: str) -> None:
    found = find(graphs(), lambda program: any(b.name == name for b in program.blocks))
    assert [b.name for b in found.blocks] == [name]


def test_a_planted_bug_shrinks_to_its_minimal_graph() -> None:
    """A softmax rule that forgets the dimension: the smallest counterexample is one softmax block."""
    planted = rule(
        "any-dim",
        lambda op, x, dim: op.softmax(x, dim),
        lambda emit, m: emit(aten._softmax.default, m.x, -1, False),
    )

    def is_wrong(program: Program) -> bool:
        if not any(block.name == "softmax" for block in program.blocks):
            return False
        trial = capture_example(Example(program, Program.inputs()))
        original = trial.copy()
        return bool(run_passes(trial, [planted]).applied and disagreement(original, trial))

    quick = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    assert find(graphs(), is_wrong, settings=quick) == Program((Block("softmax", (1.0,)),))


@pytest.mark.parametrize(
    "meta",
    [
        torch.empty(3, 4),
        torch.empty(4, 3).t(),
        torch.empty(1, 4).expand(3, 4),
        torch.empty(3, 4, dtype=torch.bfloat16)[:, ::2],
        torch.empty(3, dtype=torch.bool),
        torch.empty(0, 3),
        torch.empty(()),
        torch.empty(2, 2, dtype=torch.int64),
    ],
    ids=["contiguous", "transposed", "expanded", "gaps", "bool", "empty", "scalar", "integers"],
)
def test_operands_have_the_layout(meta: Tensor) -> None:
    @settings(max_examples=10)
    @given(operands(meta))
    def check(value: Tensor) -> None:
        assert (value.shape, value.dtype) == (meta.shape, meta.dtype)
        assert value.stride() == meta.stride() or not meta.numel()

    check()
