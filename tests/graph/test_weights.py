"""Derived constants: computed when a graph keeps them, shared, derived from each other, and never stale."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from effopt.errors import ReleasedWeightError
from effopt.graph import derivation
from effopt.graph.derivation import is_released
from effopt.graph.weights import DerivedWeights


class Calls:
    """A derivation that counts how often it is computed on real tensors."""

    def __init__(self) -> None:
        self.count = 0

    def halves(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        self.count += not isinstance(weight, torch._subclasses.FakeTensor)
        return weight[:2] * 0.5, weight[2:] * 0.5

    def twice(self, weight: Tensor) -> Tensor:
        self.count += not isinstance(weight, torch._subclasses.FakeTensor)
        return weight * 2


def negated(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cat([a, b])


def graph_of(*parameters: Any) -> tuple[GraphModule, DerivedWeights, list[Node]]:
    """A graph module with one placeholder a parameter, and nothing computed yet."""
    mode = torch._subclasses.FakeTensorMode()
    graph, nodes = Graph(), []
    for index, parameter in enumerate(parameters):
        nodes.append(graph.placeholder(f"p{index}"))
        nodes[-1].meta["val"] = mode.from_tensor(parameter)
    graph.output(())
    return GraphModule(nn.Module(), graph), DerivedWeights(parameters), nodes


def reading(module: GraphModule, *read: Node) -> GraphModule:
    (output,) = module.graph.find_nodes(op="output")
    output.args = (tuple(read),)
    module.graph.eliminate_dead_code()
    return module


def values(module: GraphModule, weights: DerivedWeights) -> list[Tensor]:
    """What the constants are when the graph is compiled, and at a call."""
    inputs = list(weights.inputs)
    weights.materialize(module)
    weights.lift(module)
    return list(weights.tensors(inputs))


def parameter(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))


def test_only_what_is_read_is_computed() -> None:
    calls, p = Calls(), parameter()
    module, weights, (node,) = graph_of(p)
    first, _ = weights.derive(module, "halves", calls.halves, node)
    weights.derive(module, "twice", calls.twice, node)
    assert calls.count == 0
    assert first.meta["val"].shape == (2, 3)
    (value,) = values(reading(module, first), weights)
    assert calls.count == 1
    assert torch.equal(value, p.detach()[:2] * 0.5)
    assert not [name for name, _ in module.named_buffers()]


def test_asking_again_gives_the_same_node() -> None:
    calls, p = Calls(), parameter()
    module, weights, (node,) = graph_of(p)
    assert weights.derive(module, "halves", calls.halves, node) == weights.derive(
        module, "halves", calls.halves, node
    )
    assert len(weights.entries) == 2


def test_graphs_share_one_constant_and_drop_it_together() -> None:
    calls, p = Calls(), parameter()
    made = []
    for _ in range(2):
        module, weights, (node,) = graph_of(p)
        made.append(
            (values(reading(module, weights.derive(module, "twice", calls.twice, node)), weights), weights)
        )
    assert made[0][0][0] is made[1][0][0]
    assert calls.count == 1
    count = len(derivation._SHARED)
    made.clear()
    del weights, module, node
    gc.collect()
    assert len(derivation._SHARED) < count


def test_other_settings_are_other_constants() -> None:
    calls, p, q = Calls(), parameter(), parameter(1)
    module, weights, (node, other) = graph_of(p, q)
    nodes = [
        weights.derive(module, "a", calls.twice, node),
        weights.derive(module, "b", calls.twice, node),
        weights.derive(module, "a", calls.twice, other),
    ]
    assert len({n.target for n in nodes}) == 3
    assert len({t.data_ptr() for t in values(reading(module, *nodes), weights)}) == 3


def test_derived_from_derived() -> None:
    """The halves are computed for the layout made of them, and are not kept."""
    calls, p = Calls(), parameter()
    module, weights, (node,) = graph_of(p)
    halves = weights.derive(module, "halves", calls.halves, node)
    assert weights.is_constant(halves[0])
    assert not weights.is_weight(halves[0])
    whole = weights.derive(module, "negated", negated, *halves)
    (value,) = values(reading(module, whole), weights)
    assert torch.equal(value, -0.5 * p.detach())
    assert calls.count == 1
    held = [d for d in derivation._SHARED.values() if d.kind == "halves" and d.parameters == (p,)]
    assert not [d for d in held if d.held]


@pytest.mark.parametrize("change", ["write", "data", "replace"])
def test_changed_parameters(change: str) -> None:
    calls, p = Calls(), parameter()
    module, weights, (node,) = graph_of(p)
    halves = weights.derive(module, "halves", calls.halves, node)
    whole = weights.derive(module, "negated", negated, *halves)
    before = values(reading(module, halves[0], whole), weights)
    memory = [t.data_ptr() for t in before]
    if change == "write":
        with torch.no_grad():
            p.add_(1)
    elif change == "data":
        p.data = torch.ones(4, 3)
    else:
        p = parameter(5)
    after = weights.tensors([p])
    assert torch.equal(after[0], p.detach()[:2] * 0.5)
    assert torch.equal(after[1], -0.5 * p.detach())
    if change != "replace":
        assert [t.data_ptr() for t in after] == memory
    count = calls.count
    weights.tensors([p])
    assert calls.count == count


def test_a_constant_owns_its_memory() -> None:
    """Freeing or writing the parameter must not reach it, even where the derivation changes nothing."""
    p = parameter()
    module, weights, (node,) = graph_of(p)
    same = weights.derive(module, "same", lambda w: w, node)
    part = weights.derive(module, "part", lambda w: (w * 2)[:1], node)
    got = values(reading(module, same, part), weights)
    assert got[0].data_ptr() != p.data_ptr()
    assert got[1].untyped_storage().nbytes() == 3 * 4


def test_made_in_inference_mode_and_changed_outside() -> None:
    calls, p = Calls(), parameter()
    module, weights, (node,) = graph_of(p)
    with torch.inference_mode():
        values(reading(module, weights.derive(module, "twice", calls.twice, node)), weights)
    with torch.no_grad():
        p.mul_(3)
    (after,) = weights.tensors([p])
    assert torch.equal(after, 2 * p.detach())
    assert not after.is_inference()


def test_new_data_at_the_address_of_the_old() -> None:
    """The second `.data` may lie where the first lay, which was freed in between."""
    p = nn.Parameter(torch.ones(64, 64))
    module, weights, (node,) = graph_of(p)
    values(reading(module, weights.derive(module, "twice", Calls().twice, node)), weights)
    addresses = {p.data_ptr()}
    for step in range(2, 34, 2):
        for number in (step, step + 1):
            p.data = p.data * 0 + number
        addresses.add(p.data_ptr())
        (after,) = weights.tensors([p])
        assert torch.equal(after, 2 * p.detach())
    assert len(addresses) < 17, "no address was used again: the test shows nothing"


@pytest.mark.parametrize("form", [torch.ones(4, 3, dtype=torch.float64), torch.ones(1, 3), torch.ones(6, 3)])
def test_data_of_another_form_has_constants_of_its_own(form: Tensor) -> None:
    p = parameter()
    given = []
    for data in (p.data, form):
        p.data = data
        module, weights, (node,) = graph_of(p)
        twice = weights.derive(module, "twice", Calls().twice, node)
        given += [(data, *values(reading(module, twice), weights))]
    for data, constant in given:
        assert constant.dtype == data.dtype
        assert torch.equal(constant, 2 * data)


def test_parameters_made_in_inference_mode_are_no_sources() -> None:
    with torch.inference_mode():
        made = parameter()
    _, weights, (node,) = graph_of(made)
    assert not weights.is_constant(node)


def test_only_parameters_are_sources() -> None:
    module, weights, (weight, plain) = graph_of(parameter(), torch.randn(2))
    with pytest.raises(ValueError, match="need parameters as sources"):
        weights.derive(module, "twice", Calls().twice, plain)
    assert weights.parameter(weight) is weights.inputs[0]
    assert weights.parameter(plain) is None
    assert not weights.is_constant(torch.ones(1))


def test_a_freed_parameter_is_known_and_not_read() -> None:
    p = parameter()
    assert not is_released(p)
    assert not is_released(torch.empty(0))
    assert not is_released(torch.eye(2).to_sparse())
    p.untyped_storage().resize_(0)
    assert is_released(p)
    module, weights, (node,) = graph_of(p)
    derived = weights.derive(module, "never made", Calls().twice, node)
    with pytest.raises(
        ReleasedWeightError, match=r"never made cannot be computed: its weight \[4, 3\] was freed"
    ):
        weights.materialize(reading(module, derived))
