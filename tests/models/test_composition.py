"""Any subset of the families in one pipeline equals the same done by hand in eager PyTorch."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import effopt
from effopt.graph.tolerances import tolerance_of
from tests.models.architectures import build, main_output, sampled, sampled_rows
from tests.models.eager_twin import relative, twin_of
from tests.models.plain import Plain

LAYERS = 4
MODELS = ("llama", "qwen3", "gpt2", "bert", "t5", "mixtral", "vit", "plain")
EXACT_FUSIONS = "fuse-residual-norm,recognize-glu,recognize-rope"


@dataclass(frozen=True)
class Request:
    """What is asked of the passes and, in other words, of the twin."""

    keep: float = 1.0
    share: int = 1
    bits: int = 0
    group: int = 0
    symmetric: bool = True
    activations: bool = False

    def passes(self) -> str:
        """The text that a user would write."""
        found = []
        if self.keep < 1:
            found.append(f"skip-layers{{keep={self.keep}}}")
        if self.share > 1:
            found.append(f"share-kv-across-layers{{group={self.share}}}")
        if self.bits:
            symmetric = str(self.symmetric).lower()
            found.append(f"quantize-weights{{bits={self.bits},group={self.group},symmetric={symmetric}}}")
        if self.activations:
            found.append("quantize-activations")
        return ",".join(found)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    bits = draw(st.sampled_from((0, 4, 8)))
    activations = bits == 8 and draw(st.booleans())
    return Request(
        keep=draw(st.sampled_from((1.0, 0.75, 0.5))),
        share=draw(st.sampled_from((1, 2, 3))),
        bits=bits,
        group=0 if activations else draw(st.sampled_from((0, 16, 48))),
        symmetric=activations or draw(st.booleans()),
        activations=activations,
    )


def model_and_inputs(name: str, batch: int, length: int) -> tuple[nn.Module, dict[str, Any]]:
    """One of `MODELS` with `LAYERS` layers, in float64: a flipped code is a fault, not noise."""
    torch.manual_seed(0)
    ids = torch.randint(3, 100, (batch, length))
    inputs: dict[str, Any] = {"input_ids": ids}
    if name == "plain":
        return Plain(LAYERS).double().eval(), inputs
    if name == "vit":
        shape = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        config: Any = transformers.ViTConfig(**shape, intermediate_size=112, image_size=16, patch_size=8)
        pixels = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
        return transformers.ViTModel(config).double().eval(), {"pixel_values": pixels}
    if name == "t5":
        counts = {"num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 4}
        config = transformers.T5Config(
            vocab_size=100, d_model=64, d_kv=16, d_ff=112, **counts, dropout_rate=0.0, use_cache=False
        )
        config.decoder_start_token_id = 0
        decoded = torch.randint(3, 100, (batch, max(1, length // 2)))
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
        return model.double().eval(), {**inputs, "decoder_input_ids": decoded}
    count = (
        {"n_layer": LAYERS, "num_hidden_layers": LAYERS} if name == "gpt2" else {"num_hidden_layers": LAYERS}
    )
    model, _ = build(name, "sdpa", **count)
    # The experts' grouped_mm has no float64.
    return (model if name == "mixtral" else model.double()), inputs


def twin(model: nn.Module, request: Request) -> nn.Module:
    """The eager oracle."""
    if not isinstance(model, Plain):
        return twin_of(model, **vars(request))
    copied = copy.deepcopy(model)
    copied.skip(request.keep)
    copied.group = request.share
    if request.bits:
        copied.quantize(request.bits, request.group, request.symmetric)
    return copied


def output_of(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else main_output(result)


def loss_of(result: Any) -> torch.Tensor:
    """Weighs every element otherwise: the mean square of normalised rows has no gradient."""
    output = output_of(result)
    return (output * torch.arange(output.numel(), dtype=output.dtype).sin().view_as(output)).sum()


def compiled_output(
    model: nn.Module, inputs: dict[str, Any], request: Request, **options: Any
) -> tuple[torch.Tensor, effopt.Report]:
    torch._dynamo.reset()
    chosen = {"passes": request.passes(), "lowering": "eager", **options}
    with effopt.record() as report:
        result = torch.compile(model, backend="effopt", options=chosen)(**inputs)
    assert not report.faults
    return output_of(result), report


@settings(max_examples=6)
@example(name="t5", request=Request(0.5, 2, 4, 16), batch=2, length=7, fused=True)
@example(name="gpt2", request=Request(0.75, 3, 8, 0, activations=True), batch=1, length=5, fused=False)
@given(
    name=st.sampled_from(MODELS),
    request=requests(),
    batch=st.integers(1, 3),
    length=st.integers(1, 13),
    fused=st.booleans(),
)
def test_any_subset_equals_the_twin(
    name: str, request: Request, batch: int, length: int, fused: bool
) -> None:
    assume(not (name in ("plain", "mixtral") and request.activations))
    model, inputs = model_and_inputs(name, batch, length)
    with torch.no_grad():
        expected = output_of(twin(model, request)(**inputs))
        got, _ = compiled_output(model, inputs, request, disable="" if fused else EXACT_FUSIONS)
    assert relative(got, expected) < tolerance_of(got.dtype).rtol


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_everything_at_once_through_inductor(name: str) -> None:
    request = Request(0.5, 2, 4, 16)
    model, inputs = model_and_inputs(name, 2, 9)
    model.float()  # Inductor leaves out the float32 rounding that these models make of float64
    with torch.no_grad():
        expected = output_of(twin(model, request)(**inputs))
        got, _ = compiled_output(model, inputs, request, lowering="auto")
    assert relative(got, expected) < tolerance_of(got.dtype).rtol


@pytest.mark.parametrize("name", sampled(MODELS, "gpt2", "t5", "plain"))
def test_training_equals_the_twin(name: str) -> None:
    request = Request(0.75, 2)
    model, inputs = model_and_inputs(name, 2, 9)
    model.float()  # norms of these models round float64 to float32, and so do their gradients
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].float()
    oracle = twin(model, request)
    loss_of(oracle(**inputs)).backward()
    got, report = compiled_output(model, inputs, request)
    loss_of(got).backward()
    assert report.graphs[0].training
    wanted = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    given_ = [p.grad for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert given_
    norms = sorted(float(g.norm()) for g in wanted.values() if g.abs().max() > 0)
    limit = 10 * tolerance_of(got.dtype).rtol
    # The gradient of a key's bias is 0, and what is computed of it is rounding.
    expected = pytest.approx(norms, rel=limit, abs=limit * max(norms))
    assert sorted(float(g.norm()) for g in given_) == expected


def test_identity_settings_are_exact() -> None:
    """Nothing asked for is the exact pipeline's graph, node by node."""
    model, inputs = model_and_inputs("llama", 2, 9)
    nothing = "skip-layers{keep=1.0},share-kv-across-layers{group=1},quantize-weights{include=none}"
    with torch.no_grad():
        got, report = compiled_output(model, inputs, Request(), passes=nothing)
        exact, plain = compiled_output(model, inputs, Request())
    assert torch.equal(got, exact)
    assert report.graphs[0].nodes_after == plain.graphs[0].nodes_after
    assert report.ops == plain.ops
    assert not {"skip-layers", "share-kv-across-layers", "quantize-weights"} & set(report.counts)


GENERATING = itertools.product(["llama", "qwen3", "gpt2", "mixtral", "t5"], [None, 24])


@pytest.mark.parametrize(
    ("name", "length"),
    sampled_rows(GENERATING, lambda *row: row in {("llama", 24), ("gpt2", None)}),
)
def test_generated_tokens_equal_the_twin(name: str, length: int | None) -> None:
    """Everything at once, with a cache of what is left: prefill and decode are graphs of one model."""
    request = Request(0.5, 2, 8, 16)
    model, inputs = model_and_inputs(name, 2, 7)
    inputs.pop("decoder_input_ids", None)
    settings_ = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "disable_compile": True}
    model.generation_config.update(**settings_, pad_token_id=0, use_cache=True)
    oracle = twin(model, request)
    plan = plan_of(model, name, request)
    cache = effopt.cache_for(model, plan, max_cache_len=length)
    options = {"plans": plan, "passes": "quantize-weights{bits=8,group=16}", "lowering": "eager"}
    model.forward = torch.compile(model.forward, backend="effopt", options=options)
    if name == "t5":  # generate calls the encoder by itself; the decoder's plan is not for it
        model.get_encoder().forward = torch.compile(
            model.get_encoder().forward,
            backend="effopt",
            options={**options, "passes": request.passes(), "plans": ()},
        )
    expected = oracle.generate(**inputs)
    assert model.generate(**inputs, past_key_values=cache).tolist() == expected.tolist()


def plan_of(model: nn.Module, name: str, request: Request) -> effopt.Plan:
    """Made of a call without a cache."""
    ids = torch.ones(1, 6, dtype=torch.long)
    batch = {"input_ids": ids, "use_cache": False}
    passes = Request(request.keep, request.share).passes()
    return effopt.calibrate(model, [{**batch, "decoder_input_ids": ids} if name == "t5" else batch], passes)
