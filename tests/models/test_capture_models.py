"""Capture of the twelve architectures: nothing refused, Dynamo's graphs, eager's values and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effopt.compile import effopt, record
from tests.models.architectures import ARCHITECTURES, MORE, build, main_output, sampled, sampled_rows

# Dynamo instantiates the context of an autograd function (BLOOM has one), and torch warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# torch.func.vmap inside the model: refused with that reason, and run unchanged.
TRANSFORMED = {"mamba"}
SWEEP = [name for name in MORE if name not in TRANSFORMED]
SPELLINGS = list(itertools.product([*ARCHITECTURES, *SWEEP], ["eager", "sdpa"]))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def outputs_and_gradients(model: torch.nn.Module, call: Callable[..., Any], inputs: Any) -> tuple[Any, Any]:
    model.zero_grad()
    out = main_output(call(**inputs))
    out.square().sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def is_fast(name: str, attn: str) -> bool:
    """Each of the twelve once, and attention both ways."""
    return name in ARCHITECTURES and (attn == "sdpa" or name in ("llama", "bloom"))


@pytest.mark.parametrize(("name", "attn"), sampled_rows(SPELLINGS, is_fast))
def test_inference_and_training(name: str, attn: str) -> None:
    model, inputs = build(name, attn)
    options = {"lowering": "eager", "pipeline": ""}
    compiled = torch.compile(model, backend=effopt, options=options)
    with record() as report:
        with torch.no_grad():
            assert relative(main_output(compiled(**inputs)), main_output(model(**inputs))) <= 1e-6
        got, gradients = outputs_and_gradients(model, compiled, inputs)
        expected, wanted = outputs_and_gradients(model, model, inputs)
    assert [g.refused for g in report.graphs] == ["", ""]
    assert relative(got, expected) <= 1e-6
    assert gradients.keys() == wanted.keys()
    for key, value in wanted.items():
        assert relative(gradients[key], value) <= 1e-5, key


@pytest.mark.parametrize("name", sampled([*ARCHITECTURES, *SWEEP], "t5-encoder"))
def test_dynamic_sizes(name: str) -> None:
    model, inputs = build(name)
    ids = inputs["input_ids"]
    options = {"lowering": "eager", "pipeline": ""}
    compiled = torch.compile(model, backend=effopt, options=options, dynamic=True)
    plain = []

    def counting(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        plain.append(module)
        return module.forward

    with record() as report, torch.no_grad():
        for length in (12, 9, 7):
            some = {"input_ids": ids[:, :length]}
            assert relative(main_output(compiled(**some)), main_output(model(**some))) <= 1e-6
        torch._dynamo.reset()
        counted = torch.compile(model, backend=counting, dynamic=True)
        for length in (12, 9, 7):
            counted(input_ids=ids[:, :length])
    assert not [g.refused for g in report.graphs if g.refused]
    assert len(report.graphs) == len(plain)
