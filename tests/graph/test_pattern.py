"""The pattern language, one property a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from effopt.graph.matching import Matcher
from effopt.graph.pattern import ANY, HOLE, Capture, Named, OpBuilder, any_of, chain, number, tensor
from effopt.passes.base import Example
from effopt.testing import capture_example

OP = OpBuilder()
X, Y, N = Capture("x"), Capture("y"), Capture("n")


def capture(run: Callable[..., Any], *sizes: tuple[int, ...], dynamic: bool = False) -> GraphModule:
    inputs = tuple(torch.randn(s) for s in sizes or ((3, 4),))
    return capture_example(Example(run, inputs), dynamic=dynamic).module


def root_of(module: GraphModule) -> Any:
    (output,) = module.graph.find_nodes(op="output")
    return output.args[0][0]


def matches(pattern: Any, module: GraphModule) -> list[Any]:
    return [state.captures for state in Matcher(pattern).solutions(root_of(module))]


def test_operands_commute_where_they_may() -> None:
    module = capture(lambda x, y: x.relu() + y, (3, 4), (3, 4))
    assert matches(OP.add(Y, OP.relu(X)), module)
    assert not matches(OP.sub(Y, OP.relu(X)), capture(lambda x, y: x.relu() - y, (3, 4), (3, 4)))


def test_one_name_is_one_value() -> None:
    assert matches(OP.mul(X, X), capture(lambda x: x * x))
    assert not matches(OP.mul(X, X), capture(lambda x, y: x * y, (3, 4), (3, 4)))


@pytest.mark.parametrize(
    ("run", "found"), [(lambda x: x.add(x, alpha=1), True), (lambda x: x.add(x, alpha=2), False)]
)
def test_arguments_not_named_hold_their_default(run: Any, found: bool) -> None:
    assert bool(matches(OP.add(X, X), capture(run))) is found


def test_dimensions_are_modulo_the_rank() -> None:
    assert matches(OP.softmax(X, -1), capture(lambda x: x.softmax(1)))
    assert not matches(OP.softmax(X, -1), capture(lambda x: x.softmax(0)))


def test_numbers_by_tolerance_and_kind() -> None:
    module = capture(lambda x: x * 0.7978845608)
    assert matches(OP.mul(X, (2 / torch.pi) ** 0.5), module)
    assert not matches(OP.mul(X, 0.79), module)
    assert matches(OP.mul(tensor(X), number(N)), module)[0]["n"] == pytest.approx(0.7978845608)
    assert not matches(OP.mul(X, number(N)), capture(lambda x, y: x * y, (3, 4), (3, 4)))


def test_alternatives_backtrack_and_tell_which() -> None:
    pattern = any_of(OP.relu(OP.neg(X)), OP.relu(any_of(OP.tanh(X), X, tag="inner")), tag="outer")
    assert [(m["outer"], m["inner"]) for m in matches(pattern, capture(lambda x: x.tanh().relu()))] == [
        (1, 0),
        (1, 1),
    ]


def test_chains_peel_any_order() -> None:
    pattern = chain(
        "steps", OP.tanh(X), scaled=OP.mul(HOLE, number(Capture("by"))), shifted=OP.add(HOLE, tensor(Y))
    )
    (found, *_) = matches(
        OP.relu(pattern), capture(lambda x, y: ((x.tanh() * 2 + y) * 3).relu(), (3, 4), (3, 4))
    )
    assert [(s.tag, s.by) for s in found["steps"]] == [("scaled", 2), ("shifted", None), ("scaled", 3)]


def test_several_results_and_names() -> None:
    module = capture(lambda x: x.max(dim=-1).values)
    (found,) = matches(OP.getitem(Named("both", OP.max(X, -1, ANY)), 0), module)
    assert found["both"].target is torch.ops.aten.max.dim


def test_the_furthest_failure_is_kept() -> None:
    matcher = Matcher(OP.relu(OP.mul(OP.tanh(X), 2.0)))
    assert not list(matcher.solutions(root_of(capture(lambda x: (x.tanh() * 3.0).relu()))))
    assert matcher.miss.reason == "other is 3.0, expected 2.0"


def test_matching_does_not_specialise() -> None:
    module = capture(lambda x: x.view(x.shape[0] * x.shape[1]).relu(), (6, 4), dynamic=True)
    sizes = [n.meta["val"].shape for n in module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert not matches(OP.relu(OP.view(X, [24])), module)
    assert all(isinstance(s, torch.SymInt) for s in sizes[0])
    guards = sizes[0][0].node.shape_env.guards
    assert not any("24" in str(guard.expr) for guard in guards)
