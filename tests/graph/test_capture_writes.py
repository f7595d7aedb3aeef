"""Capture of programs that write into their inputs, which may share memory: as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.capture_cases import assert_as_in_eager, make


class Writes:
    """Programs that write into an input, and what they return of it."""

    @staticmethod
    def add(x, y):
        x.add_(y)

    @staticmethod
    def returned(x, y):
        x.add_(y)
        return x

    @staticmethod
    def view_returned(x, y):
        x.mul_(y)
        return x.t(), x[1]

    @staticmethod
    def view_taken_before(x, y):
        view = x[1:]
        x.mul_(y)
        return view, view * 2

    @staticmethod
    def through_a_view(x, y):
        x[:, 1].add_(y[:, 0])
        return x * y

    @staticmethod
    def slice_assigned(x, y):
        x[1:3] = y[:2]
        return (x * y).sum()

    @staticmethod
    def index_copied(x, y):
        x.index_copy_(0, torch.tensor([2, 0]), y[:2])
        return x @ y.t()

    @staticmethod
    def index_put(x, y):
        x[torch.tensor([1, 3])] = y[:2]
        return x + y

    @staticmethod
    def copied(x, y):
        x.copy_(y)
        return x + 1, y

    @staticmethod
    def both(x, y):
        x.add_(y)
        y.add_(x)
        return x * y

    @staticmethod
    def swapped(x, y):
        old = x.clone()
        x.copy_(y)
        y.copy_(old)

    @staticmethod
    def old_value_kept(x, y):
        old = x * 1
        x.zero_()
        return old, x + y

    @staticmethod
    def other_dtype(x, y):
        x.copy_(y.double() * 2)
        return x

    @staticmethod
    def filled_and_read(x, y):
        z = x[0].clone()
        x.fill_(3)
        return z, x[0], x.sum()

    @staticmethod
    def unchanged_in_value(x, y):
        x.copy_(x)
        return x + y


WRITES = {k: v.__func__ for k, v in vars(Writes).items() if isinstance(v, staticmethod)}


@pytest.mark.parametrize("name", WRITES)
def test_written_input(name: str) -> None:
    assert_as_in_eager(WRITES[name], make((4, 3), (4, 3)), around=torch.no_grad, calls=2)


@pytest.mark.parametrize("name", WRITES)
def test_written_input_with_gradients_elsewhere(name: str) -> None:
    """A cache written in a training step takes part in autograd when the new value does."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((3,), 1.5))

        def forward(self, x, y):
            result = WRITES[name](x, y)
            return result, (y * self.scale).sum()

    assert_as_in_eager(Scaled(), make((4, 3), (4, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_statistics(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3))
    report = assert_as_in_eager(model.train(training), make((2, 3, 6, 6)), calls=2, rtol=1e-5)
    assert len(report.graphs) == 1


def aliased(how: str) -> Callable[[], tuple[Any, ...]]:
    def inputs() -> tuple[Any, ...]:
        base = torch.arange(12.0).reshape(4, 3)
        other = {
            "same": base,
            "view": base.view(4, 3),
            "overlap": base.view(-1)[:12].view(4, 3),
            "separate": base + 1,
        }
        return base, other[how]

    return inputs


OVERLAPPING = {"slice_assigned", "index_copied", "index_put"}  # eager itself refuses to write where it reads


@pytest.mark.parametrize("how", ["same", "view", "overlap", "separate"])
@pytest.mark.parametrize("name", [name for name in WRITES if name not in OVERLAPPING])
def test_aliased_inputs(name: str, how: str) -> None:
    """Right whether or not it is refused."""
    torch._dynamo.reset()
    reads_both = name != "filled_and_read"
    refused = "shares storage" if reads_both and how in ("view", "overlap") else None
    assert_as_in_eager(WRITES[name], aliased(how), around=torch.no_grad, refused=refused)


class AfterDropout:
    """Programs that write into what a dropout returns that does nothing: its operand."""

    @staticmethod
    def result(x, y):
        hidden = F.dropout(x * 2, 0.5, training=False)
        hidden *= y
        return hidden

    @staticmethod
    def operand_read_later(x, y):
        hidden = x * 2
        F.dropout(hidden, 0.5, training=False).mul_(y)
        return hidden + 1

    @staticmethod
    def view(x, y):
        hidden = F.dropout(input=x * 2, p=0.5, training=False)
        hidden[1:].masked_fill_(y[1:] > 0, -1.0)
        return hidden

    @staticmethod
    def probability_zero(x, y):
        hidden = torch.dropout(x * 2, 0.0, train=True)
        hidden.add_(y)
        return F.dropout(hidden, 0.5, training=False)

    @staticmethod
    def an_input(x, y):
        F.dropout(x, 0.5, training=False).add_(y)
        return x * y


AFTER_DROPOUT = {k: v.__func__ for k, v in vars(AfterDropout).items() if isinstance(v, staticmethod)}


@pytest.mark.parametrize("name", AFTER_DROPOUT)
def test_dropout_that_does_nothing_is_written(name: str) -> None:
    """XLM writes into what its dropout returns; in a trace that keeps dropout whole, torch refuses that."""
    report = assert_as_in_eager(AFTER_DROPOUT[name], make((4, 3), (4, 3)), around=torch.no_grad)
    assert not [graph.refused for graph in report.graphs if graph.refused]
