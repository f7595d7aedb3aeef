"""Capture to normal form and back: values, gradients, strides and aliases as in eager."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.graph.capture_cases import MODES, assert_as_in_eager, make


@pytest.mark.parametrize("mode", MODES)
def test_module_in_every_gradient_mode(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    report = assert_as_in_eager(model, make((3, 8)), around=MODES[mode], rtol=1e-5)
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
    report = assert_as_in_eager(PROGRAMS[name], make((4, 3), grad=mode == "grad"), around=MODES[mode])
    assert len(report.graphs) == (name != "the_input_twice")  # which is no graph: Dynamo returns the inputs
