"""Properties of the whole: meaning is kept, and matching finds exactly what is there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

from effopt import pipeline as pipelines
from effopt.graph.matching import Matcher
from effopt.graph.pattern import Call, Capture, OpBuilder
from effopt.graph.verify import check_graph
from effopt.passes.base import Example
from effopt.plugins.manager import build_registry
from effopt.testing import capture_example, disagreement, run_passes
from effopt.testing.strategies import Program, graphs

aten = torch.ops.aten
PIPELINE = pipelines.build(build_registry())


@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(program=graphs())
def test_the_exact_pipeline_keeps_meaning(program: Program, training: bool) -> None:
    """Without checked rewrites: the rules alone must be right, for values and gradients."""
    trial = capture_example(Example(program, Program.inputs()), training=training)
    original = trial.copy()
    report = run_passes(trial, PIPELINE, verify="off")
    assert not report.faults
    check_graph(trial.module, values=True)
    assert not disagreement(original, trial), report.applied


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(program=graphs(), dropped=st.sets(st.sampled_from([p.name for p in PIPELINE])))
def test_any_part_of_the_pipeline_keeps_meaning(program: Program, dropped: set[str]) -> None:
    passes = [p for p in PIPELINE if p.name not in dropped]
    trial = capture_example(Example(program, Program.inputs()))
    original = trial.copy()
    run_passes(trial, passes, verify="off")
    assert not disagreement(original, trial)


UNARY, BINARY = ("relu", "neg"), ("add", "sub", "mul")
TARGETS = {
    "relu": aten.relu.default,
    "neg": aten.neg.default,
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
}
OP = OpBuilder()


@st.composite
def small_graphs(draw: st.DrawFn) -> Graph:
    """Two inputs and up to six calls, each of anything before it."""
    graph = Graph()
    nodes = [graph.placeholder("a"), graph.placeholder("b")]
    for name in draw(st.lists(st.sampled_from([*UNARY, *BINARY]), min_size=1, max_size=6)):
        count = 1 if name in UNARY else 2
        operands = tuple(draw(st.sampled_from(nodes)) for _ in range(count))
        nodes.append(graph.call_function(TARGETS[name], operands))
    for node in nodes:
        node.meta["val"] = torch.empty(2, 2)
    graph.output(nodes[-1])
    return graph


def _patterns() -> st.SearchStrategy[Any]:
    captures = st.sampled_from([Capture("x"), Capture("y")])

    def calls(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        unary = st.tuples(st.sampled_from(UNARY), inner).map(lambda p: getattr(OP, p[0])(p[1]))
        binary = st.tuples(st.sampled_from(BINARY), inner, inner)
        return st.one_of(unary, binary.map(lambda p: getattr(OP, p[0])(p[1], p[2])))

    return calls(st.recursive(captures, calls, max_leaves=4))


def equals(pattern: Any, node: Any, assignment: dict[str, Node]) -> bool:
    """Whether `node` is the pattern with its captures replaced, operand order aside where it may be."""
    if isinstance(pattern, Capture):
        return node is assignment[pattern.name]
    assert isinstance(pattern, Call)
    if not isinstance(node, Node) or node.target not in pattern.targets:
        return False
    orders: Iterator[Any] = iter([node.args])
    if pattern.family in ("add", "mul"):
        orders = itertools.permutations(node.args)
    return any(
        all(equals(p, a, assignment) for p, a in zip(pattern.args, args, strict=True)) for args in orders
    )


@settings(max_examples=200)
@given(graph=small_graphs(), pattern=_patterns())
def test_matching_is_brute_force_isomorphism(graph: Graph, pattern: Any) -> None:
    nodes = [n for n in graph.nodes if n.op != "output"]
    assignments = [dict(zip("xy", pair, strict=True)) for pair in itertools.product(nodes, repeat=2)]
    for root in nodes:
        found = {
            (state.captures.get("x"), state.captures.get("y")) for state in Matcher(pattern).solutions(root)
        }
        expected = {(a["x"], a["y"]) for a in assignments if equals(pattern, root, a)}
        # A capture that the pattern does not hold is free in `expected`, and unbound in `found`.
        names = {
            name
            for pair in found
            for name in (("x",) if pair[1] is None else ("y",) if pair[0] is None else ("x", "y"))
        }
        bound = {
            tuple(v if n in names else None for n, v in zip("xy", pair, strict=True)) for pair in expected
        }
        assert bool(found) == bool(expected)
        assert found == (bound if found else set())
