"""Equal layers that are compiled one by one all the same, and what the report says then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effopt.backends import inductor
from effopt.compile import record
from tests.backends.outline_cases import Block, Stack, assert_gradients_close, outlined_counts


def test_a_block_that_cannot_know_its_sizes_is_left_with_the_reason() -> None:
    """Its operands have `t + 1` rows, as a cache with a new token has; none of them says what `t` is."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Block(32) for _ in range(4)).eval()

    def grown(x: Tensor, token: Tensor) -> Tensor:
        x = torch.cat([x, token])
        for layer in layers:
            x = layer(x)
        return x

    token = torch.randn(1, 32)
    with torch.no_grad(), record() as report:
        compiled = torch.compile(grown, backend="effopt", dynamic=True)
        for t in (5, 9):
            x = torch.randn(t, 32)
            torch.testing.assert_close(compiled(x, token), grown(x, token), rtol=1e-5, atol=1e-5)
    (block,) = report.graphs[0].outlined
    assert block.count >= 3
    assert "only as part of another size" in block.left
    assert block.left in " ".join(str(report).split())


def test_outlining_can_be_switched_off() -> None:
    torch.manual_seed(0)
    model, x = Stack(3).eval(), torch.randn(2, 3, 32)
    with torch.no_grad(), record() as report:
        result = torch.compile(model, backend="effopt", options={"outline": False})(x)
    assert outlined_counts(report) == []
    torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_blocks_on_which_inductor_fails_are_written_out(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a release of torch cannot compile as a subgraph compiles as it was, and the report says so."""
    torch.manual_seed(0)
    model, x = Stack(3, keep=keep), torch.randn(5, 7, 32)
    seen = []

    def compile_graph(module: torch.fx.GraphModule, inputs: Any, *_: Any) -> Any:
        calls = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
        seen.append(len(calls))
        if calls:
            raise NotImplementedError("no calls here\nat all")
        return module.forward

    monkeypatch.setattr(inductor, "compile_graph", compile_graph)
    with record() as report:
        results = torch.compile(model, backend="effopt")(x)
    assert seen[0] >= 2
    assert seen[1:] == [0]
    assert outlined_counts(report) == []
    (block,) = report.graphs[0].outlined
    assert block.left == "Inductor failed on its calls: NotImplementedError: no calls here"
    assert block.left in " ".join(str(report).split())
    torch.testing.assert_close(results, model(x), rtol=1e-5, atol=1e-5)
    got, wanted = (
        torch.autograd.grad((r[0] if keep else r).square().sum(), list(model.parameters()))
        for r in (results, model(x))
    )
    assert_gradients_close(got, wanted)


def test_a_fault_of_another_origin_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_graph(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(inductor, "compile_graph", compile_graph)
    with torch.no_grad(), pytest.raises(Exception, match="no compiler"):
        torch.compile(Stack(3), backend="effopt")(torch.randn(5, 7, 32))


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_block_is_outlined_where_inductor_writes_cpp(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Stack(3).eval(), torch.randn(5, 7, 32)
    if not compiles:
        monkeypatch.setattr(inductor, "compile_graph", lambda module, *_: module.forward)
    with torch.no_grad(), record() as report:
        options = {"inductor": {"cpp_wrapper": True}}
        result = torch.compile(model, backend="effopt", options=options)(x)
    torch.testing.assert_close(result, model(x), rtol=1e-5, atol=1e-5)
    (block,) = report.graphs[0].outlined
    assert block.count == 3
    assert "cpp_wrapper" in block.left


def test_a_block_without_operands_stays() -> None:
    """Ids that are counted out for queries and for keys are one block, twice, that reads nothing."""

    def attend(q: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        seen = at % 4 == at[:, None] % 4
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)

    q = torch.randn(1, 2, 12, 8)
    options = {"disable": ["split-attention-by-axis"]}
    with torch.no_grad(), record() as report:
        out = torch.compile(attend, backend="effopt", options=options)(q)
    assert outlined_counts(report) == []
    torch.testing.assert_close(out, attend(q))
