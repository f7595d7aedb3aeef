"""The backend as torch calls it: modes, several graphs, aliasing that changes after compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effopt.compile import effopt, record

EAGER = {"lowering": "eager"}


def test_inductor_and_eager_lowering_agree() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    x = torch.randn(3, 8)
    expected = net(x)
    for options in (EAGER, {}, {"lowering": "reference"}):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(net, backend=effopt, options=options)(x), expected)


@pytest.mark.parametrize("lowering", ["eager", "auto"])
def test_inputs_that_share_memory_only_after_compilation(lowering: str) -> None:
    """Compiled for separate memory, called with two views of one: eager's result, whatever is guarded."""

    def both(x, y):
        x.add_(1)
        y.mul_(2)
        return x + y

    compiled = torch.compile(both, backend=effopt, options={"lowering": lowering})
    with torch.no_grad():
        compiled(torch.ones(4), torch.ones(4))
        for views in (lambda t: (t[:4], t[:4]), lambda t: (t[:4], t[2:6])):
            one, two = torch.arange(8.0), torch.arange(8.0)
            torch.testing.assert_close(compiled(*views(one)), both(*views(two)))
            torch.testing.assert_close(one, two)


def test_training_and_inference_are_two_graphs() -> None:
    net = nn.Linear(4, 4)
    compiled = torch.compile(net, backend=effopt, options=EAGER)
    x = torch.randn(2, 4)
    with record() as report:
        compiled(x).sum().backward()
        with torch.no_grad():
            compiled(x)
    assert [g.training for g in report.graphs] == [True, False]


def test_training_steps_follow_eager() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    same = copy.deepcopy(net)
    compiled = torch.compile(net, backend=effopt, options=EAGER)
    steps = [(m, c, torch.optim.SGD(m.parameters(), 0.1)) for m, c in ((net, compiled), (same, same))]
    for _ in range(5):
        x = torch.randn(6, 8)
        for _, call, optimizer in steps:
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for one, two in zip(net.state_dict().values(), same.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


class Counting(nn.Module):
    """Written buffers: statistics that autograd saves, and a count, old and new, that gradients depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.count * 3
        self.count.add_(1)
        return self.norm(x) * self.count * before


def test_buffers_that_a_step_writes_train_under_inductor() -> None:
    """Torch 2.13 computes `count + 1` again in the backward pass, from the count that was written."""
    net = Counting()
    same = copy.deepcopy(net)
    compiled = torch.compile(net, backend=effopt)
    for _ in range(2):
        x = torch.randn(6, 8)
        got, wanted = (
            torch.autograd.grad((run(x) * x).sum(), list(module.parameters()))
            for module, run in ((net, compiled), (same, same))
        )
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    for one, two in zip(net.state_dict().values(), same.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


class Updating(nn.Module):
    """Gradients hang on statistics that a step has just written, and on buffers that are exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("one", torch.rand(8))
        self.register_buffer("other", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        with torch.no_grad():
            kept = self.one.clone()
            self.one.copy_(self.other)
            self.other.copy_(kept + y.mean(0))
        return y * self.norm.running_var * self.one * self.other


def test_gradients_read_buffers_as_the_forward_pass_did() -> None:
    """A copy that Inductor takes for its operand shows the buffer as it is after it was written."""
    torch.manual_seed(0)
    net = Updating()
    same = copy.deepcopy(net)
    compiled = torch.compile(net, backend=effopt)
    for _ in range(2):
        x = torch.randn(6, 8, requires_grad=True)
        got, wanted = (
            torch.autograd.grad((run(x) * x).sum(), [x, *module.parameters()])
            for module, run in ((net, compiled), (same, same))
        )
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for one, two in zip(net.state_dict().values(), same.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_refused_graph_says_why_and_runs() -> None:
    with record() as report:
        compiled = torch.compile(torch.func.vmap(lambda r: r.sin().sum()), backend=effopt, options=EAGER)
        x = torch.randn(3, 4)
        torch.testing.assert_close(compiled(x), x.sin().sum(1))
    assert any("torch.func" in g.refused for g in report.graphs)


class Count(nn.Module):
    """Counts its calls in a buffer of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * self.calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
def test_a_count_of_no_dimension_is_written(dtype: torch.dtype) -> None:
    """AOTAutograd loses those of float64 (torch 2.13), so that such a graph runs without Inductor."""
    model = Count(dtype)
    with torch.no_grad(), record() as report:
        compiled = torch.compile(model, backend="effopt")
        results = [compiled(torch.ones(3)) for _ in range(2)]
    assert model.calls == 2
    assert [r.tolist() for r in results] == [[1.0] * 3, [2.0] * 3]
    left = [r for r in report.rejected if "without Inductor" in r.reason]
    assert len(left) == (dtype == torch.float64)
