"""A lowering's own layout of a constant: derived once, and the op's layout is not kept beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from effopt.backends.base import Lowering, by_operands
from effopt.backends.lower import Lowered, lower
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.graph.round_to_nearest import quantize_rows
from effopt.graph.weights import DerivedWeights
from effopt.target import target_of

CPU = target_of(torch.device("cpu"))
OPS = {"quantized_linear": ops.quantized_linear}


def turned(packed: Tensor) -> Tensor:
    return packed.t().contiguous()


def multiply_turned(
    input: Tensor, packed: Tensor, scale: Tensor, zero: Any, bias: Any, *, bits: int, group: int
) -> Tensor:
    assert packed.shape[1] == scale.shape[0]
    return ops.quantized_linear.reference(input, packed.t(), scale, zero, bias, bits=bits, group=group)


def packed_8(weight: Tensor) -> tuple[Tensor, ...]:
    return quantize_rows(weight, bits=8, group=0, symmetric=True)


TURNED = Lowering(
    ops.quantized_linear,
    "turned",
    multiply_turned,
    lambda target, operands: None,
    lambda target, operands, result: 0.0,
    prepack={"packed": turned},
)
CANDIDATES = {"quantized_linear": [TURNED, reference_lowering(ops.quantized_linear)]}


def graph_of(weight: torch.nn.Parameter) -> tuple[GraphModule, DerivedWeights]:
    """`quantized_linear` of an input and what is derived of `weight`."""
    graph, mode = Graph(), FakeTensorMode()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["val"], w.meta["val"] = mode.from_tensor(torch.zeros(3, weight.shape[1])), mode.from_tensor(weight)
    output = graph.output((x,))
    module = GraphModule({}, graph)
    weights = DerivedWeights([torch.zeros(3, weight.shape[1]), weight])
    packed, scale = weights.derive(module, "packed-8", packed_8, w)
    with module.graph.inserting_before(output):
        arguments: tuple[Any, ...] = ((x, packed, scale), {"bits": 8, "group": 0})
        call = module.graph.call_function(ops.quantized_linear.overload, *arguments)
    call.meta["val"] = mode.from_tensor(torch.zeros(3, weight.shape[0]))
    output.args = ((call,),)
    return module, weights


def lowered(weight: torch.nn.Parameter, mode: str = "auto") -> tuple[GraphModule, DerivedWeights, Lowered]:
    module, weights = graph_of(weight)
    (done,) = lower(module, OPS, CANDIDATES, CPU, False, mode, weights)
    weights.materialize(module)
    module.recompile()
    return module, weights, done


def expected(x: Tensor, weight: Tensor) -> Tensor:
    return ops.quantized_linear.reference(x, *packed_8(weight.detach()), bits=8, group=0)


def test_the_layout_is_derived_and_the_canonical_one_is_not_kept() -> None:
    weight, x = torch.nn.Parameter(torch.randn(5, 8)), torch.randn(3, 8)
    module, _, done = lowered(weight)
    assert done.choice.lowering is TURNED
    assert torch.equal(module(x, weight)[0], expected(x, weight))
    packed = [b for b in module.buffers() if b.dtype == torch.uint8]
    assert [list(b.shape) for b in packed] == [[8, 5]]


def test_graphs_of_one_model_share_the_layout() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 8))
    (first, *_kept), (second, *_also_kept) = lowered(weight), lowered(weight)
    pointers = [sorted(b.data_ptr() for b in m.buffers()) for m in (first, second)]
    assert pointers[0] == pointers[1]


def test_the_layout_follows_the_parameter() -> None:
    weight, x = torch.nn.Parameter(torch.randn(5, 8)), torch.randn(3, 8)
    module, weights, _ = lowered(weight)
    weights.lift(module)
    for _ in range(2):
        with torch.no_grad():
            weight.mul_(-2)
        constants = weights.tensors([x, weight])
        assert torch.equal(module(x, weight, *constants)[0], expected(x, weight))


def test_other_modes_keep_the_layout_of_the_op() -> None:
    weight, x = torch.nn.Parameter(torch.randn(5, 8)), torch.randn(3, 8)
    module, _, done = lowered(weight, "eager")
    assert done.choice.lowering.name == "reference"
    assert [list(b.shape) for b in module.buffers() if b.dtype == torch.uint8] == [[5, 8]]
    assert torch.equal(module(x, weight)[0], expected(x, weight))


@pytest.mark.parametrize("known", [True, False])
def test_an_operand_that_is_no_constant_is_refused(known: bool) -> None:
    """Values that a graph computes, or constants that nobody says are, keep the op's layout."""
    module, weights = graph_of(torch.nn.Parameter(torch.randn(5, 8)))
    if known:
        (call,) = module.graph.find_nodes(op="call_function", target=ops.quantized_linear.overload)
        packed = call.args[1]
        with module.graph.inserting_before(call):
            doubled = module.graph.call_function(torch.ops.aten.bitwise_not.default, (packed,))
        doubled.meta["val"] = packed.meta["val"]
        call.replace_input_with(packed, doubled)
    (done,) = lower(module, OPS, CANDIDATES, CPU, False, "auto", weights if known else None)
    assert done.choice.lowering.name == "reference"
    (name, reason), *rest = done.choice.refused
    assert (name, rest) == ("turned", [])
    assert reason == "wants packed in a layout of its own, made once, and it is no constant of the graph"


def test_run_takes_the_layout_of_the_op() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    packed, scale = packed_8(weight)
    result = TURNED.run(x, packed, scale, bits=8, group=0)
    assert torch.equal(result, expected(x, weight))


def test_a_function_of_operands_takes_the_arguments_of_the_op() -> None:
    """Those not given as the schema says; none too few and none of another op, as with a signature."""
    q = torch.randn(1, 2, 3, 4)
    told: list[Mapping[str, Any]] = []
    call = by_operands(ops.attention)(told.append)
    call(q, q, value=q, scale=0.5, low=-1)
    (operands,) = told
    assert operands == ops.attention.bind((q, q, q), {"scale": 0.5, "low": -1})
    for wrong in ({"scale": 0.5, "eps": 1e-5}, {}):
        with pytest.raises(TypeError, match="append: expected query, key, value, scale"):
            call(q, q, q, **wrong)
