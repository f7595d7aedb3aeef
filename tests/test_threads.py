"""Several threads compile and call models at once: no state of the process is left changed or mixed up."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from effopt.backends import inductor
from effopt.compilation import Compilation
from effopt.compile import effopt as backend
from effopt.graph import weights
from effopt.graph.weights import DerivedWeights
from tests.graph.test_weights import graph_of, parameter, reading

_invoke = torch.ops.higher_order.invoke_subgraph


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that threads begin together."""
    begin = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        begin.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(timeout=600) for future in [threads.submit(run, call) for call in calls]]


def test_backends_called_without_dynamo_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """They set the collector's threshold and put back what they found: what overlaps would leave it set."""
    inside, most, run = [], [], Compilation.run

    def counted(self: Compilation, *given: Any) -> Any:
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.05)
        try:
            return run(self, *given)
        finally:
            inside.remove(self)

    monkeypatch.setattr(Compilation, "run", counted)
    before, x = gc.get_threshold(), torch.randn(3)

    modules = [make_fx(lambda x: (torch.tanh(x) + x,))(x) for _ in range(4)]
    calls = [lambda m=m: backend(m, [x], options={"lowering": "eager"})(x) for m in modules]
    for (found,) in at_once(*calls):
        torch.testing.assert_close(found, torch.tanh(x) + x)
    assert most == [1] * 4
    assert gc.get_threshold() == before


class Stack(nn.Module):
    def __init__(self, depth: int, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(depth))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + self.activation(layer(norm(x))).cos()
        return x


@pytest.mark.slow
def test_two_models_train_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, outlined: the operator's flag is only set while a compilation has it set."""
    torch.manual_seed(0)
    flag, known = "_supports_training_input_mutation", inductor._known_to_write_nothing
    before, entered = getattr(_invoke, flag, None), []

    @contextmanager
    def seen(module: Any) -> Iterator[None]:
        assert getattr(_invoke, flag, None) == before
        entered.append(module)
        with known(module):
            yield
        assert getattr(_invoke, flag, None) == before

    monkeypatch.setattr(inductor, "_known_to_write_nothing", seen)
    models = [Stack(3, 8, torch.sigmoid), Stack(4, 12, torch.tanh)]
    inputs = [torch.randn(5, 8), torch.randn(2, 3, 12)]

    def train(model: nn.Module, run: Any, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((run(x) * x).sum(), list(model.parameters()))

    compiled = [torch.compile(model, backend="effopt") for model in models]
    calls = [lambda i=i: train(models[i], compiled[i], inputs[i]) for i in range(2)]
    for i, got in enumerate(at_once(*calls)):
        for g, w in zip(got, train(models[i], models[i], inputs[i]), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())
    assert len(entered) == 2
    assert getattr(_invoke, flag, None) == before


def test_constants_are_those_of_the_call_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread calls the same code with another model's parameters, just after they were compared."""
    one, other = parameter(0), parameter(1)
    module, made, (node,) = graph_of(one)
    made.derive(module, "twice", lambda weight: weight * 2, node)
    reading(module, *module.graph.find_nodes(op="get_attr"))
    made.materialize(module)
    made.tensors([one])
    compare = weights.is_in_state

    def interrupted(source: Tensor, was: Any) -> bool:
        found = compare(source, was)
        monkeypatch.setattr(weights, "is_in_state", compare)
        thread = threading.Thread(target=DerivedWeights.tensors, args=(made, [other]))
        thread.start()
        thread.join()
        return found

    monkeypatch.setattr(weights, "is_in_state", interrupted)
    assert torch.equal(made.tensors([one])[0], one * 2)
    assert torch.equal(made.tensors([other])[0], other * 2)
