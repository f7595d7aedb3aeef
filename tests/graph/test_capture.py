"""Capture to normal form and back: values, gradients, strides, aliases and writes as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.capture_cases import compare

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def make(*sizes: tuple[int, ...], grad: bool = False) -> Callable[[], tuple[Any, ...]]:
    """Equal random inputs each time."""

    def inputs() -> tuple[Any, ...]:
        torch.manual_seed(1)
        return tuple(torch.randn(size).requires_grad_(grad) for size in sizes)

    return inputs


@pytest.mark.parametrize("mode", MODES)
def test_module_in_every_gradient_mode(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    report = compare(model, make((3, 8)), around=MODES[mode], rtol=1e-5)
    assert report.graphs[0].training == (mode == "grad")


class NormalForm:
    """Programs whose outputs have a relation to inputs or to one another."""

    @staticmethod
    def view_of_input(x):
        return x.t(), x + 1

    @staticmethod
    def slice_of_input(x):
        return x[1:, ::2]

    @staticmethod
    def the_input(x):
        return x, x * 2

    @staticmethod
    def the_input_twice(x):
        return x, x

    @staticmethod
    def one_output_twice(x):
        y = x.sin()
        return y, y

    @staticmethod
    def view_of_an_output(x):
        y = x.sin()
        return y, y.t(), y[0]

    @staticmethod
    def two_views_of_one_value(x):
        y = x.sin()
        return y[0], y[1]

    @staticmethod
    def constants(x):
        return x.sin(), 3, None, "word", 2.5, True, torch.ones(2)

    @staticmethod
    def transposed_output(x):
        return (x + 1).t() * 2

    @staticmethod
    def expanded_output(x):
        return x.sum(0, keepdim=True).expand(4, x.shape[1])

    @staticmethod
    def detached(x):
        return x.sin().detach(), x.cos()

    @staticmethod
    def nothing(x):
        x.sin()

    @staticmethod
    def in_place_on_a_copy(x):
        y = x.clone()
        y.mul_(2).add_(1)
        y[0] = 7
        y[:, 1] += x[:, 0]
        return y

    @staticmethod
    def slice_assignment(x):
        y = torch.zeros(4, 3, dtype=torch.float64)
        y[1:3] = x[:2].double()
        y[0] = x[0, 0].double()
        return y * 2

    @staticmethod
    def copy_into(x):
        y = torch.empty(2, 4, 3)
        y.copy_(x)
        return y.sin()

    @staticmethod
    def masked_assignment(x):
        y = x.clone()
        y[x > 0] = 0.5
        return y

    @staticmethod
    def no_grad_region(x):
        with torch.no_grad():
            scale = x.abs().amax()
            shifted = x * 2
        return x / scale + shifted * x, scale

    @staticmethod
    def no_grad_region_with_views(x):
        with torch.no_grad():
            rows = x.t()[0].exp()
            total = rows.sum() + 1
        return x * total, rows

    @staticmethod
    def no_grad_output(x):
        with torch.no_grad():
            y = x.sin()
            view = x[1]
        return y, y * x, view * x

    @staticmethod
    def no_grad_around_an_integer(x):
        with torch.no_grad():
            best = x.argmax(-1, keepdim=True)
        return x.gather(1, best)

    @staticmethod
    def dropout(x):
        return F.dropout(x, 0.5), torch.rand(3), torch.randn_like(x) + x

    @staticmethod
    def sdpa_dropout(x):
        y = x[None, None]
        return F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)

    @staticmethod
    def several_results(x):
        values, indices = x.sort(dim=-1)
        low, high = values.chunk(2, dim=0)
        return low * 2, high, indices.max()

    @staticmethod
    def unused_result(x):
        values, _ = x.topk(2)
        return values.sum()

    @staticmethod
    def complex_numbers(x):
        return torch.view_as_real(torch.view_as_complex(x[:, :2].contiguous()) * 1j)

    @staticmethod
    def double(x):
        return x.double() @ x.double().t()


PROGRAMS = {k: v.__func__ for k, v in vars(NormalForm).items() if isinstance(v, staticmethod)}


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, mode: str) -> None:
    report = compare(PROGRAMS[name], make((4, 3), grad=mode == "grad"), around=MODES[mode])
    assert len(report.graphs) == (name != "the_input_twice")  # which is no graph: Dynamo returns the inputs


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
    compare(WRITES[name], make((4, 3), (4, 3)), around=torch.no_grad, calls=2)


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

    compare(Scaled(), make((4, 3), (4, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_statistics(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3))
    report = compare(model.train(training), make((2, 3, 6, 6)), calls=2, rtol=1e-5)
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
    compare(WRITES[name], aliased(how), around=torch.no_grad, refused=refused)
