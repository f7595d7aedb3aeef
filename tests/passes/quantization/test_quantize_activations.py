"""Integer linear layers against ones written by hand, wherever a model calls `linear`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from effopt.compile import check_options
from effopt.errors import PipelineError
from effopt.graph.tolerances import tolerance_of
from tests.models.architectures import sampled
from tests.models.eager_twin import Int8, relative
from tests.passes.quantization.quantized_models import model_and_inputs, output_of, run

MODELS = {"llama": 15, "gpt2": 9, "bert": 13, "t5": 33, "vit": 13, "plain": 13}


class OnIntegers(TorchFunctionMode):
    """Every linear layer runs on integers, as written out in `Int8`; also GPT-2's, which is an `addmm`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            return Int8(weight.detach(), kwargs.get("bias", bias))(x)
        if func is torch.addmm:
            bias, x, weight = args
            return Int8(weight.detach().T, bias)(x)
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", sampled(MODELS, "gpt2", "t5", "plain"))
def test_equals_the_twin(name: str) -> None:
    model, inputs = model_and_inputs(name)
    with torch.no_grad(), OnIntegers():
        want = output_of(model(**inputs))
    got, report = run(model, inputs, "quantize-weights,quantize-activations")
    assert report.counts["quantize-activations"] == MODELS[name]
    # In float64 what is before a layer agrees to 1e-10, but a token may lie that near to a tie.
    assert relative(got, want) < tolerance_of(torch.float32).rtol


def test_other_forms_of_weights_have_a_reason() -> None:
    model, inputs = model_and_inputs("llama")
    for options, words in (
        ("bits=4", "its weight has 4 bits; it takes quantize-weights{bits=8}"),
        ("group=16", "scales a row; it takes quantize-weights{group=0}"),
        ("symmetric=false", "its weight has zeros; it takes quantize-weights{symmetric=true}"),
    ):
        _, report = run(model, inputs, f"quantize-weights{{{options},include=lm_head}},quantize-activations")
        assert report.counts["quantize-activations"] == 0
        assert [r for r in report.rejected if words in r.reason and r.layer == "lm_head"]


def test_layers_left_out_stay_in_floating_point() -> None:
    model, inputs = model_and_inputs("llama")
    _, report = run(model, inputs, "quantize-weights{exclude=*.down_proj},quantize-activations")
    assert report.ops["int8_linear"] == 13
    assert report.ops["linear"] == 2


def test_it_needs_quantised_weights() -> None:
    with pytest.raises(PipelineError, match="quantize-activations requires 'quantize-weights'"):
        check_options({"passes": "quantize-activations"})


def test_a_prefix_of_a_batch_gives_the_same_tokens() -> None:
    """Each token has a scale of its own: what else is in the batch does not change it."""
    model = nn.Linear(40, 24)
    x = torch.randn(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    passes = "quantize-weights,quantize-activations"
    whole, _ = run(model, {"input": x}, passes)
    for i in range(6):
        alone, _ = run(model, {"input": x[i : i + 1]}, passes)
        assert torch.equal(alone[0], whole[i])
