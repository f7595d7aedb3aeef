"""Convexity and order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph

from effopt.graph.dataflow import def_use, is_convex, sort_topologically


def relu_chain(count: int) -> tuple[Graph, list[torch.fx.Node]]:
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(count):
        nodes.append(graph.call_function(torch.relu, (nodes[-1],)))
    graph.output(nodes[-1])
    return graph, nodes


def test_a_path_that_comes_back_is_not_convex() -> None:
    graph, nodes = relu_chain(4)
    assert is_convex(graph, nodes[1:4])
    assert not is_convex(graph, [nodes[1], nodes[3]])
    assert set(def_use(nodes[1:3]).edges) == {(nodes[1], nodes[2])}


@st.composite
def dags(draw: st.DrawFn) -> Graph:
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(draw(st.integers(1, 7))):
        operands = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=2))
        nodes.append(graph.call_function(torch.add, (*operands,)))
    graph.output(nodes[-1])
    return graph


@given(dags(), st.data())
def test_convex_is_what_reachability_says(graph: Graph, data: st.DataObject) -> None:
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    region = set(data.draw(st.lists(st.sampled_from(nodes), min_size=1, unique=True)))

    def reaches(node: torch.fx.Node) -> bool:
        return any(user in region or reaches(user) for user in node.users)

    left = {user for node in region for user in node.users if user not in region}
    assert is_convex(graph, region) == (not any(reaches(node) for node in left))


@given(dags(), st.randoms(use_true_random=False))
def test_sorting_mends_any_order(graph: Graph, random: object) -> None:
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    shuffled = nodes[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (source,) = graph.find_nodes(op="placeholder")
    for node in shuffled:
        source.append(node)
    sort_topologically(graph)
    graph.lint()
    after = [n for n in graph.nodes if n.op == "call_function"]
    assert set(after) == set(nodes)
    assert all(operand < node for node in after for operand in node.all_input_nodes)


def test_a_cycle_is_refused() -> None:
    graph, nodes = relu_chain(3)
    nodes[1].args = (nodes[3],)
    with pytest.raises(ValueError, match="cycle"):
        sort_topologically(graph)
