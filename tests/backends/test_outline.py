"""Outlined blocks compute what the flat graph did, gradients included, and are compiled once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effopt.backends.outline import outline
from effopt.compile import record
from effopt.graph.normalize import view_base
from tests.backends.outline_cases import Stack, assert_gradients_close, outlined_counts


@pytest.mark.parametrize(
    "keep",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["last", "every-layer-returned-as-a-view"],
)
def test_training_gradients_equal_eager(keep: bool) -> None:
    """Saved activations that alias a block's operands must survive buffer reuse (backends/aliasing.py)."""
    torch.manual_seed(0)
    model, x = Stack(4, keep=keep), torch.randn(5, 7, 32, requires_grad=True)
    with record() as report:
        results = torch.compile(model, backend="effopt")(x)
    assert max(outlined_counts(report)) >= 3

    def loss(outputs: Any) -> Tensor:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.stack([(o * o.detach().roll(k + 1)).sum() for k, o in enumerate(outputs)]).sum()

    parameters = [x, *model.parameters()]
    got = torch.autograd.grad(loss(results), parameters)
    wanted = torch.autograd.grad(loss(model(x)), parameters)
    assert_gradients_close(got, wanted)


def test_inference_returns_views_of_every_layer() -> None:
    torch.manual_seed(0)
    model, x = Stack(3, keep=True).eval(), torch.randn(5, 7, 32)
    with torch.no_grad(), record() as report:
        compiled = torch.compile(model, backend="effopt")
        results = compiled(x)
    assert max(outlined_counts(report)) >= 2
    for got, wanted in zip(results, model(x), strict=True):
        assert got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_copies_that_disagree_on_gradients_are_not_one_block() -> None:
    """The first layers are frozen: they share no backward graph with the trained ones."""
    torch.manual_seed(0)
    model, x = Stack(4), torch.randn(2, 3, 32)
    for block in list(model.blocks)[:2]:
        block.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    with record() as report:
        got = torch.autograd.grad((torch.compile(model, backend="effopt")(x) * x).sum(), trained)
    assert 4 not in outlined_counts(report)
    wanted = torch.autograd.grad((model(x) * x).sum(), trained)
    assert_gradients_close(got, wanted)


def test_dynamic_sizes_do_not_cut_blocks() -> None:
    class Reshaping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                b, t, d = x.shape
                flat = torch.relu(layer(x).view(b * t, d) + 1.0)
                x = x + torch.tanh(flat.view(b, t, d).exp() * 0.1)
            return x

    torch.manual_seed(0)
    model = Reshaping().eval()
    with torch.no_grad(), record() as report:
        compiled = torch.compile(model, backend="effopt", dynamic=True)
        for b, t in ((2, 3), (4, 5), (3, 9)):
            x = torch.randn(b, t, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(report.graphs) == 1
    assert 4 in outlined_counts(report)


class Gated(nn.Module):
    """A layer whose norm stays outside the block, so that the caller reads the block's tangent again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.down(torch.sigmoid(self.up(y)) * torch.tanh(self.up(y) + 1))
        y = y * scale + torch.cos(y) - torch.sin(y).abs()
        return x + y.tanh()


class Chain(nn.Module):
    def __init__(self, depth: int, cut: int) -> None:
        super().__init__()
        self.layers, self.cut = nn.ModuleList(Gated() for _ in range(depth)), cut

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.ones(8)
        for i, layer in enumerate(self.layers):
            x = layer(x.detach() if i == self.cut else x, scale)
        return x


@pytest.mark.parametrize(
    "cut", [pytest.param(-1, marks=pytest.mark.slow), 2], ids=["whole", "cut-in-the-middle"]
)
def test_a_subgraph_does_not_write_into_its_operands(cut: int) -> None:
    """Inductor 2.13 lets a subgraph's backward overwrite its tangent (backends/inductor.py)."""
    torch.manual_seed(0)
    model, x = Chain(5, cut), torch.randn(3, 8)
    with record() as report:
        loss = (torch.compile(model, backend="effopt")(x) * x).sum()
    assert max(outlined_counts(report)) >= 3
    trained = [p for i, layer in enumerate(model.layers) if i >= cut for p in layer.parameters()]
    got = torch.autograd.grad(loss, trained)
    wanted = torch.autograd.grad((model(x) * x).sum(), trained)
    assert_gradients_close(got, wanted)


class PreNorm(nn.Module):
    """A residual sum is fused with the norm that follows it; the last sum has no other reader."""

    def __init__(self, depth: int, width: int = 32) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(depth + 1))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width), nn.Sigmoid())
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x)).cos()
        return self.norms[-1](x)


def test_a_last_layer_with_an_unread_result_is_outlined_in_training_too() -> None:
    torch.manual_seed(0)
    model, x = PreNorm(4), torch.randn(5, 32, requires_grad=True)
    with record() as report:
        result = torch.compile(model, backend="effopt")(x)
    assert report.ops["add_rms_norm"] == 4
    assert outlined_counts(report) == [4]
    got = torch.autograd.grad((result * x).sum(), list(model.parameters()))
    wanted = torch.autograd.grad((model(x) * x).sum(), list(model.parameters()))
    assert_gradients_close(got, wanted)


class Split(nn.Module):
    """Keeps parts of a product for the backward pass, and ends with a no-op that Inductor removes."""

    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(depth + 1))
        self.into = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, into, out in zip(self.norms, self.into, self.out, strict=False):
            q, k, v = into(norm(x)).chunk(3, dim=-1)
            x = x + out(torch.tanh(out(q) + k @ v.transpose(1, 2) @ out(v)))
        return self.norms[-1](x)


def test_a_call_run_anew_has_the_results_that_were_added() -> None:
    """Fake results of a subgraph are cached: Inductor found no 28th result of Mamba's layers (torch 2.13)."""
    torch.manual_seed(0)
    model, x = Split(2), torch.randn(2, 5, 8)
    with record() as report:
        result = torch.compile(model, backend="effopt")(x)
    assert outlined_counts(report) == [2]
    got = torch.autograd.grad((result * x).sum(), list(model.parameters()))
    wanted = torch.autograd.grad((model(x) * x).sum(), list(model.parameters()))
    assert_gradients_close(got, wanted)


def test_the_subgraph_operator_is_left_as_it_was() -> None:
    operator, flag = torch.ops.higher_order.invoke_subgraph, "_supports_training_input_mutation"
    if not hasattr(operator, flag):
        pytest.skip("this torch has no such flag on the operator, so there is nothing to leave alone")
    before = getattr(operator, flag)
    loss = torch.compile(PreNorm(3), backend="effopt")(torch.randn(2, 32)).sum()
    assert getattr(operator, flag) == before
    loss.backward()


def traced(function: Any, *inputs: Any) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)


def test_a_block_returns_no_part_of_a_value() -> None:
    """Inductor would reuse the part's extent of memory, in which the other parts lie (GPT-NeoX)."""

    def layers(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for weight in weights:
            q, k, v = (x @ weight).chunk(3, dim=-1)
            x = x + torch.tanh(q * k).cos() * k.sin() + q.exp().abs().sqrt().neg()
            kept.append(v)
        return (x, *kept)

    inputs = [torch.randn(4, 8), *(torch.randn(8, 24) / 8 for _ in range(3))]
    module = traced(layers, *inputs)
    (made,) = outline(module, inputs, training=False)
    body = getattr(module, made.name)
    assert made.count == 3
    assert [view_base(n) for n in body.graph.output_node().args[0]] == [None] * 2
    for got, wanted in zip(module(*inputs), layers(*inputs), strict=True):
        torch.testing.assert_close(got, wanted)
