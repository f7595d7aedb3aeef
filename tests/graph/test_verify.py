"""What a valid graph is, and undoing changes to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from effopt.errors import InvalidGraphError
from effopt.graph.printing import listing
from effopt.graph.snapshot import Snapshot
from effopt.graph.verify import check_graph
from effopt.passes.base import Example
from effopt.testing import capture_example
from tests.passes.conftest import run_compiled

aten = torch.ops.aten


@pytest.fixture
def module() -> GraphModule:
    return capture_example(
        Example(lambda x, y: ((x @ y).relu() + 1, x.sum()), (torch.randn(3, 3), torch.randn(3, 3)))
    ).module


def call(module: GraphModule, target: Any) -> Any:
    (node,) = module.graph.find_nodes(op="call_function", target=target)
    return node


def no_value(module: GraphModule) -> None:
    del call(module, aten.relu.default).meta["val"]


def in_place(module: GraphModule) -> None:
    call(module, aten.relu.default).target = aten.relu_.default


def out_of_order(module: GraphModule) -> None:
    relu = call(module, aten.relu.default)
    next(iter(relu.users)).append(relu)


def method(module: GraphModule) -> None:
    relu = call(module, aten.relu.default)
    relu.op, relu.target = "call_method", "relu"


def missing_attribute(module: GraphModule) -> None:
    relu = call(module, aten.relu.default)
    with module.graph.inserting_before(relu):
        relu.args = (module.graph.create_node("get_attr", "not_there"),)


def late_input(module: GraphModule) -> None:
    with module.graph.inserting_after(call(module, aten.relu.default)):
        module.graph.placeholder("late")


def wrong_value(module: GraphModule) -> None:
    relu = call(module, aten.relu.default)
    relu.meta["val"] = relu.meta["val"].new_empty((3, 4))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_value, "no fake value"),
        (in_place, "writes in place"),
        (out_of_order, "defined later"),
        (method, "call_method"),
        (missing_attribute, "does not have"),
        (late_input, "placeholders come first"),
        (wrong_value, "is recorded as"),
    ],
)
def test_a_damaged_graph(module: GraphModule, damage: Callable[[GraphModule], None], words: str) -> None:
    check_graph(module, values=True)
    before, saved = listing(module), Snapshot(module.graph)
    damage(module)
    with pytest.raises(InvalidGraphError, match=words):
        check_graph(module, values=True)
    if damage is method:
        pytest.skip("the kind of a node is not among what a snapshot restores: no pass can change it")
    saved.restore()
    assert listing(module) == before
    check_graph(module, values=True)


def test_what_checks_a_size_that_data_decide_needs_no_value() -> None:
    """Rows picked by a mask: passes would be blamed for the call that checks how many there are."""

    def picked(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x[torch.tensor([1, 0, 1]).bool()]).square()

    x = torch.randn(3, 4)
    out, report = run_compiled(picked, x)
    torch.testing.assert_close(out, picked(x))
    assert not any(graph.faults for graph in report.graphs)


def test_a_snapshot_brings_erased_nodes_back(module: GraphModule) -> None:
    inputs = (torch.randn(3, 3), torch.randn(3, 3))
    expected = module(*inputs)
    saved = Snapshot(module.graph)
    relu = call(module, aten.relu.default)
    relu.replace_all_uses_with(relu.args[0])
    module.graph.erase_node(relu)
    saved.restore()
    check_graph(module, values=True)
    module.recompile()
    torch.testing.assert_close(module(*inputs), expected)
