"""Canonical ops found in real architectures, equal to what the configuration implies; results as eager's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import architectures

LAYERS = 2
# norms, ropes, glus, linears of two layers, their last norm and the language-model head.
EXPECTED: dict[str, dict[str, int]] = {
    "llama": {"rms_norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 7 * LAYERS + 1},
    "gemma2": {"rms_norm": 4 * LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 7 * LAYERS + 1},
    "qwen3": {"rms_norm": 4 * LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 7 * LAYERS + 1},
    "mixtral": {"rms_norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 5 * LAYERS + 1},
    "gpt-neox": {"layer_norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "linear": 4 * LAYERS + 1},
    "phi3": {"rms_norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 4 * LAYERS + 1},
    "gpt-j": {"layer_norm": LAYERS + 1, "rope": 2 * LAYERS, "linear": 6 * LAYERS + 1},
    "cohere": {"layer_norm": LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 7 * LAYERS + 1},
    "olmo2": {"rms_norm": 4 * LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 7 * LAYERS + 1},
    "gpt2": {"layer_norm": 2 * LAYERS + 1, "linear": 4 * LAYERS + 1},
    "bert": {"layer_norm": 2 * LAYERS + 1, "linear": 6 * LAYERS},
    "stablelm": {"layer_norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 7 * LAYERS + 1},
    "gpt-oss": {"rms_norm": 2 * LAYERS + 1, "rope": 2 * LAYERS, "glu": LAYERS, "linear": 5 * LAYERS + 1},
}
JOINED = {"rms_norm": "add_rms_norm", "layer_norm": "add_layer_norm"}


# tests/models/test_attention_models.py compiles and compares the others of the twelve.
FAST = "gemma2", "mixtral", "gpt-neox", "phi3", "gpt-j", "cohere", "gpt2"


@pytest.mark.parametrize("name", architectures.sampled(EXPECTED, *FAST))
def test_counts_and_results(name: str, compiled: Callable[..., Any]) -> None:
    model, inputs = architectures.build(name, "eager")
    model.eval()
    with torch.no_grad():
        want = model(**inputs)[0]
        got, report = compiled(lambda: model(**inputs)[0])
    found = {op: report.ops[op] + report.ops[JOINED.get(op, "")] for op in EXPECTED[name]}
    assert found == EXPECTED[name]
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize(
    "name", architectures.sampled(["llama", "gemma2", "gpt-neox", "cohere"], "gemma2", "gpt-neox")
)
def test_gradients(name: str, compiled: Callable[..., Any]) -> None:
    model, inputs = architectures.build(name, "eager")
    weights = list(model.parameters())
    want = torch.autograd.grad(model(**inputs)[0].square().sum(), weights, allow_unused=True)
    got, report = compiled(lambda: model(**inputs)[0])
    found = torch.autograd.grad(got.square().sum(), weights, allow_unused=True)
    assert report.ops["rope"] == 2 * LAYERS
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-7


def test_dynamic_shapes(compiled: Callable[..., Any]) -> None:
    model, inputs = architectures.build("llama", "eager")
    with torch.no_grad():
        want = model(**inputs)[0]
        got, report = compiled(lambda: model(**inputs)[0], dynamic=True)
    assert {op: report.ops[op] for op in ("rope", "glu", "linear")} == {"rope": 4, "glu": 2, "linear": 15}
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_bfloat16(compiled: Callable[..., Any]) -> None:
    model, inputs = architectures.build("gemma2", "eager")
    model.to(torch.bfloat16)
    with torch.no_grad():
        want = model(**inputs)[0].float()
        got, report = compiled(lambda: model(**inputs)[0])
    assert report.ops["rms_norm"] + report.ops["add_rms_norm"] == 4 * LAYERS + 1
    assert (got.float() - want).abs().max() <= 2e-2 * want.abs().max()
