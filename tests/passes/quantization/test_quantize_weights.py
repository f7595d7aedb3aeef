"""Quantised layers against the same rounding done by hand on the model's modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from effopt.compile import effopt, record
from effopt.errors import OptionError
from effopt.graph.tolerances import tolerance_of
from effopt.options import Options
from effopt.passes.quantization.quantize_weights import QuantizeWeights
from tests.models.architectures import build, sampled_rows
from tests.models.eager_twin import quantize, relative, rounded
from tests.models.plain import Plain
from tests.passes.quantization.quantized_models import model_and_inputs, output_of, reasons, run, spec

MODELS = ("llama", "qwen3", "gpt2", "bert", "t5", "mixtral", "vit", "plain")
CASES = [
    *((name, 8, 0, True) for name in MODELS),
    *((name, 4, 48, False) for name in MODELS),
    ("llama", 8, 0, False),
    ("llama", 4, 32, True),
]


def is_fast(name: str, bits: int, group: int, symmetric: bool) -> bool:
    """Each model once, and each way to quantise."""
    eight = name in ("llama", "t5", "vit", "plain")
    return (bits == 8) == eight or (name, bits, group) == ("llama", 4, 32)


@pytest.mark.parametrize(("name", "bits", "group", "symmetric"), sampled_rows(CASES, is_fast))
def test_equals_the_twin(name: str, bits: int, group: int, symmetric: bool) -> None:
    model, inputs = model_and_inputs(name)
    twin = copy.deepcopy(model)
    if isinstance(twin, Plain):
        twin.quantize(bits, group, symmetric)
    else:
        quantize(twin, bits, group, symmetric, activations=False)
    got, report = run(model, inputs, spec(bits, group, symmetric))
    with torch.no_grad():
        want, original = output_of(twin(**inputs)), output_of(model(**inputs))
    assert relative(got, want) < tolerance_of(got.dtype).rtol
    assert relative(want, original) > 100 * tolerance_of(got.dtype).rtol
    expected = {
        "llama": 15,
        "qwen3": 15,
        "gpt2": 9,
        "bert": 13,
        "t5": 33,
        "mixtral": 11,
        "vit": 13,
        "plain": 13,
    }
    assert report.counts["quantize-weights"] == expected[name]


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float16), ("llama", torch.float32)]
)
def test_low_precision_equals_the_twin(name: str, dtype: torch.dtype) -> None:
    model, inputs = model_and_inputs(name)
    model = model.to(dtype)
    twin = copy.deepcopy(model)
    quantize(twin, 4, 16, False, activations=False)
    got, _ = run(model, inputs, spec(4, 16, False))
    with torch.no_grad():
        assert relative(got.float(), output_of(twin(**inputs)).float()) < tolerance_of(dtype).rtol


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_embeddings_and_tied_heads(name: str) -> None:
    """GPT-2 and T5 tie their heads: with `embeddings` head and table read the same codes."""
    model, inputs = model_and_inputs(name)
    twin = copy.deepcopy(model)
    done: set[int] = set()
    for module in twin.modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"
        if is_matrix and id(weight) not in done and (module.weight.shape[1] >= 16):
            turned = type(module).__name__ == "Conv1D"
            value = rounded(weight.detach().T if turned else weight.detach(), 4, 16, True)[0]
            module.weight.data = value.T.contiguous() if turned else value
            done.add(id(weight))
    got, report = run(model, inputs, spec(4, 16, True, embeddings="true"))
    with torch.no_grad():
        assert relative(got, output_of(twin(**inputs))) < tolerance_of(got.dtype).rtol
    assert report.ops["quantized_embedding"] == {"llama": 1, "gpt2": 2, "t5": 2}[name]
    notes = [a.note for a in report.applied if a.pass_name == "quantize-weights"]
    assert not any("tied" in note for note in notes)


def test_a_tied_head_is_quantised_and_its_table_is_not() -> None:
    model, inputs = model_and_inputs("gpt2")
    _, report = run(model, inputs, "quantize-weights")
    (head,) = [a for a in report.applied if a.layer == "lm_head"]
    assert head.note.endswith("the embedding that it is tied to keeps the original")
    assert report.ops["quantized_embedding"] == 0


@pytest.mark.slow  # tests/models/test_composition.py has one that is not: with skipped and shared layers
def test_through_inductor() -> None:
    model, inputs = model_and_inputs("llama")
    model.float()  # Inductor leaves out the float32 rounding that Llama makes of float64
    twin = copy.deepcopy(model)
    quantize(twin, 4, 32, True, activations=False)
    got, _ = run(model, inputs, spec(4, 32, True), lowering="auto")
    with torch.no_grad():
        assert relative(got, output_of(twin(**inputs))) < tolerance_of(got.dtype).rtol


def test_groups_larger_than_a_row() -> None:
    model, inputs = model_and_inputs("llama")
    _, report = run(model, inputs, "quantize-weights{group=100}")
    assert report.counts["quantize-weights"] == 2  # down_proj, rows of 112
    assert "group=100 is more than a row has; take group=64 or group=0" in reasons(report)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantize-weights{bits=5}", "'bits' must be one of [4, 8], got 5"),
        ("quantize-weights{bits=4.0}", "'bits' must be int"),
        ("quantize-weights{group=-1}", "'group' must lie in [0, None], got -1"),
        ("quantize-weights{symmetric=1}", "'symmetric' must be bool"),
        ("quantize-weights{include=3}", "'include' must be str"),
        ("quantize-weights{embeddings=yes}", "'embeddings' must be bool"),
        ("quantize-weights{bit=4}", "Did you mean 'bits'?"),
        ("quantize-activations{bits=4},quantize-weights", "'bits' must be one of [8], got 4"),
    ],
)
def test_options_are_checked(text: str, words: str) -> None:
    from effopt.compile import check_options

    with pytest.raises(OptionError) as caught:
        check_options({"passes": text})
    assert words in str(caught.value)
    assert Options.parse({"passes": text}).passes == text


@pytest.mark.parametrize(("name", "cache"), [("llama", "dynamic"), ("llama", "static"), ("gpt2", "static")])
def test_tokens_are_those_of_the_twin(name: str, cache: str) -> None:
    model, inputs = build(name, use_cache=True)
    twin = copy.deepcopy(model)
    quantize(twin, 4, 16, True, activations=False)
    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "disable_compile": True,
    }
    if cache == "static":
        settings["cache_implementation"] = "static"
    mask = torch.ones_like(inputs["input_ids"])
    expected = twin.generate(inputs["input_ids"], attention_mask=mask, **settings)
    options = {"lowering": "eager", "passes": spec(4, 16, True)}
    model.forward = torch.compile(model.forward, backend=effopt, options=options)
    with record() as report:
        got = model.generate(inputs["input_ids"], attention_mask=mask, **settings)
    assert got.tolist() == expected.tolist()
    assert len(report.graphs) >= 2


def test_the_text_form_reads_back() -> None:
    chosen = QuantizeWeights(bits=4, group=128, symmetric=False, include="*.mlp.*|lm_head", embeddings=True)
    assert chosen.spec() == (
        "quantize-weights{bits=4,group=128,symmetric=false,include=*.mlp.*|lm_head,embeddings=true}"
    )
