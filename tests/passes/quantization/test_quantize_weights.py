"""Quantised layers against the same rounding done by hand on the model's modules, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from effopt.compile import effopt, record
from effopt.errors import OptionError
from effopt.graph.tolerances import tolerance_of
from effopt.options import Options
from effopt.passes.quantization.quantize_weights import QuantizeWeights
from effopt.plugins.report import Report
from tests.models.architectures import build, main_output, sampled_rows
from tests.models.eager_twin import quantize, relative, rounded
from tests.models.plain import Plain

MODELS = ("llama", "qwen3", "gpt2", "bert", "t5", "mixtral", "vit", "plain")
CASES = [
    *((name, 8, 0, True) for name in MODELS),
    *((name, 4, 48, False) for name in MODELS),
    ("llama", 8, 0, False),
    ("llama", 4, 32, True),
]
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_and_inputs(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model in float64, so that a wrong code cannot pass for rounding."""
    torch.manual_seed(0)
    ids = torch.randint(3, 100, (2, 7))
    if name == "plain":
        return Plain(2).double().eval(), {"input_ids": ids}
    if name == "vit":
        config: Any = transformers.ViTConfig(**SMALL, intermediate_size=112, image_size=16, patch_size=8)
        model: nn.Module = transformers.ViTModel(config)
        return model.double().eval(), {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=100, d_model=64, d_kv=16, d_ff=112, num_layers=2, num_heads=4, use_cache=False
        )
        model = transformers.T5ForConditionalGeneration(config)
        return model.double().eval(), {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    model, _ = build(name)
    # The experts' grouped_mm has no float64.
    return model if name == "mixtral" else model.double(), {"input_ids": ids}


def output_of(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else main_output(result)


def run(model: nn.Module, inputs: dict[str, Any], passes: str, **options: Any) -> tuple[torch.Tensor, Report]:
    torch._dynamo.reset()
    settings = {"lowering": "eager", "passes": passes, **options}
    with torch.no_grad(), record() as report:
        result = torch.compile(model, backend=effopt, options=settings)(**inputs)
    assert not report.faults
    return output_of(result), report


def reasons(report: Report) -> list[str]:
    return [r.reason for r in report.rejected if r.pass_name == "quantize-weights"]


def spec(bits: int, group: int, symmetric: bool, **more: Any) -> str:
    given = {"bits": bits, "group": group, "symmetric": str(symmetric).lower(), **more}
    return f"quantize-weights{{{','.join(f'{k}={v}' for k, v in given.items())}}}"


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


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 24, bias=False)).double()


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
