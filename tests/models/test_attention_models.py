"""Every attention block of real architectures is recognised, and the model computes what it did."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from effopt.compile import effopt, record
from effopt.plugins.report import Report
from tests.models.architectures import ARCHITECTURES, MORE, build, main_output, sampled, sampled_rows

# BLOOM makes an instance of its autograd function, as Dynamo does when it traces it (transformers 5.23).
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

OTHERS = [
    "gpt-oss",
    "gemma3",
    "deepseek-v3",
    "codegen",
    "gpt-neo",
    "mpnet",
    "deberta-v2",
    "bamba",
    "gpt-bigcode",
]


def compiled(model: torch.nn.Module, inputs: Any, dynamic: bool | None = None) -> tuple[torch.Tensor, Report]:
    torch._dynamo.reset()

    def backend(module: Any, example_inputs: Any) -> Any:
        return effopt(module, example_inputs, options={"lowering": "eager"})

    with record() as report:
        out = main_output(torch.compile(model, backend=backend, dynamic=dynamic)(**inputs))
    return out, report


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


SPELLINGS = list(itertools.product([*ARCHITECTURES, *OTHERS], ["eager", "sdpa"]))


def is_fast(name: str, attn: str) -> bool:
    """All that spell attention out, and three of those that may call the library."""
    return attn == "eager" or name in ("llama", "bloom", "gpt-oss")


@pytest.mark.parametrize(("name", "attn"), sampled_rows(SPELLINGS, is_fast))
def test_inference(name: str, attn: str) -> None:
    model, inputs = build(name, attn)
    with torch.no_grad():
        out, report = compiled(model, inputs)
        wanted = main_output(model(**inputs))
    blocks = (ARCHITECTURES.get(name) or MORE[name]).attention_blocks
    assert report.ops["attention"] == blocks, report.rejected
    assert distance(out, wanted) < 2e-5


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, "bloom", "t5-encoder", "gpt2"))
def test_symbolic_sizes(name: str) -> None:
    model, inputs = build(name, "eager")
    with torch.no_grad():
        out, report = compiled(model, inputs, dynamic=True)
        wanted = main_output(model(**inputs))
    assert report.ops["attention"] == ARCHITECTURES[name].attention_blocks, report.rejected
    assert distance(out, wanted) < 2e-5


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, "gemma2", "bloom", "t5-encoder", "gpt2"))
def test_gradients(name: str) -> None:
    model, inputs = build(name, "eager")
    model.train()
    out, report = compiled(model, inputs)
    assert report.ops["attention"] == ARCHITECTURES[name].attention_blocks, report.rejected
    direction = torch.randn_like(out)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad((out * direction).sum(), parameters, allow_unused=True)
    reference = (main_output(model(**inputs)) * direction).sum()
    wanted = torch.autograd.grad(reference, parameters, allow_unused=True)
    pairs = [(g, w) for g, w in zip(got, wanted, strict=True) if w is not None]
    # Of all together: a key bias has gradient 0, so that its own is rounding alone.
    assert distance(*(torch.cat([p[i].flatten() for p in pairs]) for i in (0, 1))) < 1e-3


@pytest.mark.parametrize(
    "name", sampled(["llama", "gemma2", "t5-encoder", "bloom", "gpt-neox"], "gemma2", "t5-encoder")
)
def test_bfloat16(name: str) -> None:
    model, inputs = build(name, "eager")
    exact = main_output(model.double()(**inputs)).detach()
    model = model.bfloat16()
    with torch.no_grad():
        out, report = compiled(model, inputs)
        wanted = main_output(model(**inputs))
    assert report.ops["attention"] == ARCHITECTURES[name].attention_blocks, report.rejected
    # No further from float64 than eager is, with a tenth for the luck of rounding.
    assert distance(out.double(), exact) < 1.1 * distance(wanted.double(), exact)
