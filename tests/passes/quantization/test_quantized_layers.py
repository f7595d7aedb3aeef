"""Which weights are quantised, and when again: paths, parameters, views, changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from effopt.compile import effopt, record
from effopt.graph.tolerances import tolerance_of
from tests.models.eager_twin import quantize, relative, rounded
from tests.passes.quantization.quantized_models import layers, model_and_inputs, output_of, reasons, run, spec


def test_what_is_no_linear_layer_has_a_reason() -> None:
    model, inputs = model_and_inputs("vit")
    _, report = run(model, inputs, "quantize-weights")
    assert [r for r in reasons(report) if "conv2d" in r or "convolution" in r]
    model, inputs = model_and_inputs("mixtral")
    _, report = run(model, inputs, "quantize-weights")
    assert len([r for r in reasons(report) if "grouped_mm" in r]) == 4


def test_paths_choose_layers() -> None:
    model, inputs = model_and_inputs("llama")
    _, report = run(model, inputs, "quantize-weights{include=*.mlp.*|lm_head,exclude=*.1.mlp.up_proj}")
    done = {a.layer for a in report.applied if a.pass_name == "quantize-weights"}
    mlp = {f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")}
    assert done == {*mlp, "lm_head"} - {"model.layers.1.mlp.up_proj"}
    left = reasons(report)
    assert "exclude=*.1.mlp.up_proj names model.layers.1.mlp.up_proj" in left
    assert "include=*.mlp.*|lm_head does not name model.layers.0.self_attn.q_proj" in left


def test_parameters_choose_layers_that_have_no_module() -> None:
    model, inputs = model_and_inputs("plain")
    _, report = run(model, inputs, "quantize-weights{include=*_1}")
    assert report.counts["quantize-weights"] == 6
    assert any("include=*_1 does not name q_0" in r for r in reasons(report))


def test_a_path_that_no_layer_has() -> None:
    model, inputs = model_and_inputs("llama")
    got, report = run(model, inputs, "quantize-weights{include=model.layer.0.mlp.up_proj}")
    assert (
        "no layer of this graph is model.layer.0.mlp.up_proj; near is model.layers.0.mlp.up_proj"
        in reasons(report)
    )
    with torch.no_grad():
        assert torch.equal(got, output_of(run(model, inputs, "")[0]))


def test_training_is_refused() -> None:
    model, inputs = model_and_inputs("llama")
    torch._dynamo.reset()
    with record() as report:
        out = torch.compile(
            model, backend=effopt, options={"lowering": "eager", "passes": "quantize-weights"}
        )(**inputs)
    assert report.counts["quantize-weights"] == 0
    assert all("must stay leaves" in r for r in reasons(report))
    output_of(out).sum().backward()
    assert model.lm_head.weight.grad is not None


def test_weights_that_are_no_parameters_are_refused() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.randn(8, 24))
            self.register_buffer("c", torch.randn(8, 24))

        def forward(self, x: torch.Tensor) -> Any:
            return nn.functional.linear(x, self.a * self.b) + nn.functional.linear(x, self.c)

    _, report = run(Computed(), {"x": torch.randn(3, 24)}, "quantize-weights")
    assert report.counts["quantize-weights"] == 0
    assert len([r for r in reasons(report) if "is not a parameter of the model" in r]) == 2


class Spelled(nn.Module):
    """One weight, read as it is, transposed, in part and by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(24, 24)), nn.Parameter(torch.randn(3, 10, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.w).tanh()
        x = nn.functional.linear(x, self.w).tanh()
        x = (x @ self.w).tanh()
        x = nn.functional.linear(x, self.w[:16]).tanh()
        return nn.functional.linear(x, self.v[1][:, :16])


def test_views_of_a_weight_are_quantised_as_they_are_read() -> None:
    model, x = Spelled(), torch.randn(3, 24)
    got, report = run(model, {"x": x}, spec(4, 8, False))
    w, v = model.w.detach(), model.v.detach()
    whole, turned = rounded(w, 4, 8, False)[0], rounded(w.T, 4, 8, False)[0]
    y = (x @ whole.T).tanh()
    y = ((y @ whole.T).tanh() @ turned.T).tanh()
    y = (y @ rounded(w[:16], 4, 8, False)[0].T).tanh()
    torch.testing.assert_close(got, y @ rounded(v[1][:, :16], 4, 8, False)[0].T)
    assert report.counts["quantize-weights"] == 5


def test_under_autocast_the_cast_weight_is_quantised() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)), torch.randn(5, 64)
    twin = copy.deepcopy(model)
    for module in (twin[0], twin[2]):
        module.weight.data = rounded(module.weight.detach().bfloat16(), 8, 16, True)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        got, report = run(model, {"input": x}, spec(8, 16, True))
        with torch.no_grad():
            want = twin(x)
    assert got.dtype == torch.bfloat16
    assert report.counts["quantize-weights"] == 2
    assert relative(got.float(), want.float()) < tolerance_of(torch.bfloat16).rtol


def change_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].weight.mul_(-2)


def change_data(model: nn.Module) -> None:
    model[2].weight.data = torch.randn_like(model[2].weight)


def replace(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(torch.randn_like(model[2].weight))


def load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def load_by_assignment(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def replace_module(model: nn.Module) -> None:
    model[2] = nn.Linear(48, 24, bias=False, dtype=torch.float64)


@pytest.mark.parametrize(
    "change", [change_in_place, change_data, replace, load, load_by_assignment, replace_module]
)
def test_changed_weights_are_quantised_again(change: Callable[[nn.Module], None]) -> None:
    model, x = layers(), torch.randn(5, 32, dtype=torch.float64)
    options = {"lowering": "eager", "passes": spec(8, 16, True)}
    compiled = torch.compile(model, backend=effopt, options=options)
    with torch.no_grad():
        before = compiled(x)
        for _ in range(2):
            change(model)
            twin = copy.deepcopy(model)
            quantize(twin, 8, 16, True, activations=False)
            got = compiled(x)
            assert relative(got, twin(x)) < tolerance_of(got.dtype).rtol
            assert relative(got, before) > 1e-3
