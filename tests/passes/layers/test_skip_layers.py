"""Skipped layers: the model with those modules removed, in every mode; and what cannot be asked for."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt.graph.printing import listing
from effopt.passes.layers.skip_layers import evenly_spaced
from tests.models.architectures import build, sampled, sampled_rows
from tests.models.eager_twin import relative, skip_layers
from tests.models.plain import Plain
from tests.models.test_composition import model_and_inputs, output_of

MODELS = ("llama", "qwen3", "gpt2", "bert", "t5", "mixtral", "vit", "plain")
FLOAT32 = 2e-5


def in_float32(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = model_and_inputs(name, 2, 9)
    return model.float(), {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}


def twin_of(model: nn.Module, keep: float) -> nn.Module:
    twin = copy.deepcopy(model)
    if isinstance(twin, Plain):
        twin.skip(keep)
    else:
        skip_layers(twin, keep)
    return twin


def compiled(model: Any, passes: str, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="effopt", options={"lowering": "eager", "passes": passes, **options})


@pytest.mark.parametrize(
    ("name", "keep"),
    sampled_rows(itertools.product(MODELS, [0.5, 0.75]), lambda name, keep: keep == 0.5 or name == "gpt2"),
)
def test_equals_the_model_without_the_layers(name: str, keep: float) -> None:
    model, inputs = in_float32(name)
    with torch.no_grad(), effopt.record() as report:
        got = output_of(compiled(model, f"skip-layers{{keep={keep}}}")(**inputs))
        want = output_of(twin_of(model, keep)(**inputs))
        original = output_of(model(**inputs))
    assert relative(got, want) < FLOAT32
    assert relative(got, original) > 100 * FLOAT32
    skipped = report.counts["skip-layers"]
    assert skipped == (2 if name == "t5" else 1) * (4 - round(4 * keep))


@pytest.mark.parametrize("name", sampled(MODELS, "gpt2", "t5", "plain"))
def test_gradients_are_those_of_the_model_without_the_layers(name: str) -> None:
    model, inputs = in_float32(name)
    model.train()
    twin = twin_of(model, 0.5)
    output_of(compiled(model, "skip-layers{keep=0.5}")(**inputs)).sin().mean().backward()
    output_of(twin(**inputs)).sin().mean().backward()
    names = {p.data_ptr(): n for n, p in model.named_parameters()}
    assert len(names) > 10
    own = gradients_by_value(model)
    expected = gradients_by_value(twin)
    assert own.keys() == expected.keys()
    for key, gradient in own.items():
        assert relative(gradient, expected[key]) < 2e-4, key


def gradients_by_value(model: nn.Module) -> dict[tuple[float, ...], Tensor]:
    """Gradients by the first entries of their parameters, for the twin's have other names.

    Those that are not used, and those that start all equal, such as norms, are left out.
    """
    found = {}
    for parameter in model.parameters():
        first = tuple(parameter.detach().flatten()[:4].tolist())
        if parameter.grad is not None and len(set(first)) > 1:
            found[first] = parameter.grad
    return found


@pytest.mark.parametrize("cache", sampled(["dynamic", "static"], "static"))
@pytest.mark.parametrize("name", sampled(["llama", "qwen3", "gpt2", "mixtral"], "gpt2"))
def test_generate_with_an_ordinary_cache(name: str, cache: str) -> None:
    count = {"n_layer": 4, "num_hidden_layers": 4} if name == "gpt2" else {"num_hidden_layers": 4}
    model, inputs = build(name, use_cache=True, **count)
    expected = tokens(twin_of(model, 0.5), inputs["input_ids"], cache)
    with effopt.record() as report:
        model.forward = compiled(model.forward, "skip-layers{keep=0.5}")
        got = tokens(model, inputs["input_ids"], cache)
    assert got.tolist() == expected.tolist()
    notes = [a.note for g in report.graphs for a in g.applied if a.pass_name == "skip-layers"]
    assert len(notes) >= 4
    assert all("its cache is still written: pass past_key_values=effopt.cache_for" in note for note in notes)


def tokens(model: nn.Module, ids: Tensor, cache: str) -> Tensor:
    extra: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
        disable_compile=True,
        **extra,
    )


def test_dynamic_sizes() -> None:
    model, _ = build("llama", num_hidden_layers=4)
    twin = twin_of(model, 0.5)
    with torch.no_grad():
        skipping = torch.compile(
            model,
            backend="effopt",
            dynamic=True,
            options={"lowering": "eager", "passes": "skip-layers{keep=0.5}"},
        )
        for length in (5, 9, 17):
            ids = torch.randint(3, 100, (2, length))
            assert relative(skipping(ids).logits, twin(ids).logits) < FLOAT32


@pytest.mark.parametrize("name", sampled(["llama", "plain"], "plain"))
def test_keep_1_changes_nothing(name: str) -> None:
    model, inputs = in_float32(name)
    graphs: dict[str, str] = {}
    outputs = {}
    for spec in ("", "skip-layers{keep=1}"):
        torch._dynamo.reset()
        with torch.no_grad():
            outputs[spec] = output_of(compiled(model, spec, plugins=[Listing(graphs, spec)])(**inputs))
    assert len(set(graphs.values())) == 1
    assert torch.equal(*outputs.values())


class Listing:
    """Keeps the graph as it is after the last pass that looks at layers."""

    def __init__(self, graphs: dict[str, str], key: str) -> None:
        self.graphs, self.key = graphs, key

    @effopt.hookimpl(wrapper=True)
    def effopt_run_pass(self, pass_: Any, module: Any, context: Any) -> Any:
        result = yield
        self.graphs[self.key] = listing(module)
        return result


def test_a_list_of_layers() -> None:
    model, inputs = build("llama", num_hidden_layers=5)
    twin = copy.deepcopy(model)
    del twin.model.layers[3]
    del twin.model.layers[0]
    with torch.no_grad(), effopt.record() as report:
        got = compiled(model, "skip-layers{layers=[3,0]}")(**inputs).logits
        assert relative(got, twin(**inputs).logits) < FLOAT32
    applied = [a.layer for g in report.graphs for a in g.applied if a.pass_name == "skip-layers"]
    assert applied == ["model.layers.0", "model.layers.3"]


def test_one_stack_of_two() -> None:
    model, inputs = in_float32("t5")
    twin = copy.deepcopy(model)
    for i in (2, 1):
        del twin.decoder.block[i]
    with torch.no_grad(), effopt.record() as report:
        got = compiled(model, "skip-layers{keep=0.5,include=decoder.*}")(**inputs).logits
        assert relative(got, twin(**inputs).logits) < FLOAT32
    assert report.counts["skip-layers"] == 2
    assert any("include=decoder.* does not hold all of encoder.block.0" in r.reason for r in report.rejected)


def test_position_biases_of_a_skipped_layer_are_still_computed() -> None:
    """T5 makes them in its first layer, for all."""
    model, inputs = build("t5-encoder", num_layers=3)
    with torch.no_grad(), effopt.record() as report:
        got = compiled(model, "skip-layers{layers=[0]}")(**inputs).last_hidden_state
        own = model.encoder.block
        bias = {}
        hook = own[0].register_forward_hook(lambda m, a, out: bias.update(x=out[1]))
        model(**inputs)
        hook.remove()
        x = model.encoder.embed_tokens(inputs["input_ids"])
        for block in own[1:]:
            x = block(x, position_bias=bias["x"])[0]
        want = model.encoder.final_layer_norm(x)
    assert relative(got, want) < FLOAT32
    assert report.counts["skip-layers"] == 1


def test_random_draws_of_a_skipped_layer_go_with_it() -> None:
    model, inputs = build("gpt2", n_layer=4, num_hidden_layers=4)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model.train()
    twin = twin_of(model, 0.5)
    results = []
    for run in (compiled(model, "skip-layers{keep=0.5}"), twin):
        torch.manual_seed(0)
        results.append(run(**inputs).logits)
    assert relative(*(r.detach() for r in results)) < FLOAT32


def test_operations_go_down() -> None:
    model, inputs = build("llama", num_hidden_layers=8)
    flops = {}
    for keep in (1, 0.5):
        torch._dynamo.reset()
        with torch.no_grad():
            report = effopt.explain(
                model, **inputs, options={"lowering": "eager", "passes": f"skip-layers{{keep={keep}}}"}
            )
        flops[keep] = sum(g.cost["flops_after"] for g in report.graphs)
    per_layer = flops[1] - flops[0.5]
    assert 0.4 * flops[1] < per_layer < 0.5 * flops[1]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("skip-layers{keep=0}", "keep"),
        ("skip-layers{keep=1.5}", "keep"),
        ("skip-layers{keep=-1}", "keep"),
        ("skip-layers{keep=nan}", "keep"),
        (
            "skip-layers{layers=[1,9]}",
            "there is no layer 9: the stack that begins with model.layers.0 has 4 layers",
        ),
        ("skip-layers{layers=[-1]}", "there is no layer -1"),
        ("skip-layers{layers=[0,1,2,3]}", "would skip all 4 layers"),
        ("skip-layers{layers=3}", "layers"),
        ("skip-layers{layers=[]}", "'layers' is empty"),
        ("skip-layers{layers=[0.5]}", "must hold whole numbers, got 0.5"),
        ("skip-layers{layers=[first]}", "must hold whole numbers, got 'first'"),
        ("skip-layers{keep=0.5},skip-layers{layers=[1]}", "were both asked for"),
        ("skip-layers,drop-layers", "conflict"),
    ],
)
def test_bad_input(spec: str, words: str) -> None:
    if "model.layers" in words:
        model, inputs = build("llama", num_hidden_layers=4)
    else:  # Dynamo is through with it in a tenth of the time
        model, inputs = Plain(4), {"input_ids": torch.randint(3, 100, (2, 9))}
    with torch.no_grad(), pytest.raises(Exception, match=r".") as caught:
        compiled(model, spec)(**inputs)
    assert words in str(caught.value)
    assert any(
        kind in str(caught.value) + type(caught.value).__name__ for kind in ("OptionError", "PipelineError")
    )


def test_evenly_spaced() -> None:
    assert evenly_spaced(8, 0.5) == [0, 2, 5, 7]
    assert evenly_spaced(4, 0.75) == [0, 2, 3]
    for count in range(1, 65):
        assert evenly_spaced(count, 1.0) == list(range(count))
        for keep in (0.01, 0.25, 0.3, 0.5, 0.75, 0.9):
            kept = evenly_spaced(count, keep)
            assert kept == sorted(set(kept))
            assert kept[0] == 0
            assert kept[-1] == count - 1
            assert len(kept) == max(min(count, 2), round(keep * count))
            gaps = [b - a for a, b in itertools.pairwise(kept)]
            assert not gaps or max(gaps) - min(gaps) <= 1
