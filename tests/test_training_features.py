"""What surrounds a model in training: hooks, checkpointing, optimizers, transforms, nested compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effopt.compile import record

OPTIONS = {"lowering": "eager"}


def compiled(model: Any, **settings: Any) -> Any:
    return torch.compile(model, backend="effopt", options=OPTIONS, **settings)


class Layer(nn.Module):
    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.dropout = nn.RMSNorm(width, eps=1e-6), nn.Dropout(dropout)
        self.gate, self.up, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.dropout(self.down(nn.functional.silu(self.gate(h)) * self.up(h)))


class Stack(nn.Module):
    def __init__(self, depth: int = 3, recompute: str | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dropout=dropout) for _ in range(depth))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recompute is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.recompute == "reentrant")
        return x


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    result = run(x)
    (result * torch.sin(torch.arange(result.numel()).view_as(result))).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_trains_as_eager(model: nn.Module, x: Tensor, **settings: Any) -> Any:
    wanted = gradients(model, model, x)
    with record() as report:
        got = gradients(compiled(model, **settings), model, x)
    assert wanted
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    return report


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 16, requires_grad=True)


@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
def test_checkpointed_dropout_has_the_gradient_of_its_forward(way: str, x: Tensor) -> None:
    """The recomputed mask must be the one that the forward pass drew."""
    assert_trains_as_eager(Stack(recompute=way, dropout=0.5), x)


class Counted(nn.Module):
    """A checkpointed layer, and a buffer that is written outside of its region, or inside."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.layer, self.inside = nn.Linear(16, 16), inside
        self.register_buffer("count", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.region, x, use_reentrant=False)
        if not self.inside:
            self.count.add_(1)
        return y

    def region(self, x: Tensor) -> Tensor:
        if self.inside:
            self.count.add_(1)
        return torch.tanh(self.layer(x))


@pytest.mark.parametrize("inside", [False, True])
def test_buffers_beside_checkpointed_regions_are_written(inside: bool, x: Tensor) -> None:
    """Inside, eager writes again where it computes the region again."""
    model = Counted(inside)
    same = copy.deepcopy(model)
    assert_trains_as_eager(model, x)
    for _ in range(2):
        gradients(same, same, x)
    torch.testing.assert_close(model.count, same.count)


def test_hooks_on_modules_and_parameters(x: Tensor) -> None:
    model = Stack()
    seen: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda module, inputs, output: output * 2)
    model.layers[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.layers[0].gate.register_forward_hook(lambda *args: seen.append(args[2].detach().clone()))
    model.layers[0].up.weight.register_hook(lambda gradient: gradient * 3)
    assert_trains_as_eager(model, x)
    torch.testing.assert_close(seen[1], seen[0])


# Dynamo itself reads `.grad` of the hooked value.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_backward_hooks(x: Tensor) -> None:
    model = Stack()
    model.layers[1].register_full_backward_hook(lambda module, given, taken: (given[0] * 2,))
    assert_trains_as_eager(model, x.detach())


def test_marked_dynamic_sizes_make_one_graph() -> None:
    model, sizes = Stack(2), ((3, 7), (2, 9), (5, 33))
    run = compiled(model)
    with record() as report:
        for b, t in sizes:
            y = torch.randn(b, t, 16)
            if (b, t) == sizes[0]:
                torch._dynamo.mark_dynamic(y, 0)
                torch._dynamo.mark_dynamic(y, 1)
            torch.testing.assert_close(gradients(run, model, y), gradients(model, model, y))
    assert len(report.graphs) == 1


def test_an_optimizer_inside_the_compiled_function_runs_unchanged_with_the_reason() -> None:
    def train(wrap: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model = Stack(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(y: Tensor) -> None:
            optimizer.zero_grad()
            model(y).sin().mean().backward()
            optimizer.step()

        run = wrap(step)
        for seed in range(3):
            run(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed)))
        return [p.detach() for p in model.parameters()]

    wanted = train(lambda step: step)
    with record() as report:
        got = train(compiled)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert any("optimizer" in (graph.refused or "") for graph in report.graphs)


def test_model_compile_in_place_and_nested_compile(x: Tensor) -> None:
    model = Stack()
    untouched = copy.deepcopy(model)
    model.layers[0].compile(backend="effopt", options=OPTIONS)
    model.compile(backend="effopt", options=OPTIONS, fullgraph=True)
    assert model.state_dict().keys() == untouched.state_dict().keys()
    torch.testing.assert_close(gradients(model, model, x), gradients(untouched, untouched, x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda y: f(y).pow(2).sum()),
        lambda f: torch.func.vmap(f),
        lambda f: lambda y: torch.func.jvp(f, (y,), (torch.ones_like(y),)),
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_transforms_over_a_compiled_function(transform: Any, x: Tensor) -> None:
    model = Stack(2)
    y = x.detach()
    torch.testing.assert_close(transform(compiled(model))(y), transform(model)(y))


def test_replicas_of_one_model_keep_their_own_weights(x: Tensor) -> None:
    replicas = [Stack(2) for _ in range(3)]
    runs = [compiled(replica) for replica in replicas]
    with torch.no_grad():
        for run, replica in zip(runs, replicas, strict=True):
            torch.testing.assert_close(run(x), replica(x))
