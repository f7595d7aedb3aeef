"""Released weights: compiled code that goes on without them, and errors for all that cannot."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from effopt.compile import effopt, record
from effopt.errors import ReleasedWeightError
from tests.models.architectures import build, main_output, sampled
from tests.models.plain import Plain
from tests.released_models import EAGER, compile_released, layers, records, released_layers, resident

EAGER_USES: dict[str, Callable[[nn.Sequential], Any]] = {
    "call": lambda m: m(torch.randn(5, 32)),
    "call of a layer": lambda m: m[2](torch.randn(5, 48)),
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": lambda m: m.load_state_dict(layers().state_dict()),
    "to": lambda m: m.to(torch.float64),
    "half": lambda m: m.half(),
    "deepcopy": copy.deepcopy,
    "deepcopy of a layer": lambda m: copy.deepcopy(m[0]),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("use", EAGER_USES)
def test_eager_uses_raise_and_change_nothing(use: str) -> None:
    model, compiled, x, before = released_layers()
    norm = model[3].weight.detach().clone()
    with pytest.raises(ReleasedWeightError, match=r"0.weight|2.weight") as caught:
        EAGER_USES[use](model)
    assert "was freed by option 'release_weights'; call the compiled model, or load the model again" in str(
        caught.value
    )
    assert torch.equal(model[3].weight, norm)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(compiled(x), before)


def test_shapes_and_guards_stay() -> None:
    model, compiled, x, _ = released_layers()
    assert [tuple(m.weight.shape) for m in (model[0], model[2])] == [(48, 32), (24, 48)]
    assert [m.weight.untyped_storage().nbytes() for m in (model[0], model[2])] == [0, 0]
    with torch.no_grad(), record() as report:
        compiled(x)
        assert not report.graphs
        more = compiled(torch.cat([x, x]))
        deep = compiled(x[None, :2])
    assert len(report.graphs) == 2
    torch.testing.assert_close(more[:5], more[5:])
    torch.testing.assert_close(deep[0], more[:2])


@pytest.mark.parametrize("cache", sampled(["dynamic", "static"], "dynamic"))
@pytest.mark.parametrize("way", sampled(["forward", "module"], "forward"))
def test_generate_goes_on(way: str, cache: str) -> None:
    model, inputs = build("llama", use_cache=True)
    other = copy.deepcopy(model)
    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "disable_compile": True,
    }
    if cache == "static":
        settings["cache_implementation"] = "static"
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    passes = "quantize-weights{bits=4,group=16,embeddings=true}"
    other.forward = torch.compile(other.forward, backend=effopt, options={**EAGER, "passes": passes})
    expected = other.generate(ids, attention_mask=mask, **settings)
    if way == "forward":
        model.forward = compile_released(model.forward, passes)
    else:
        model.compile(backend=effopt, options={**EAGER, "passes": passes, "release_weights": True})
    for _ in range(2):
        got = model.generate(ids, attention_mask=mask, **settings)
        assert got.tolist() == expected.tolist()
    assert resident(model) < 2000
    with pytest.raises(ReleasedWeightError, match="lm_head"):
        model.lm_head(torch.randn(1, 64))


def test_a_model_without_submodules() -> None:
    model, ids = Plain(2), torch.randint(100, (2, 6))
    with torch.no_grad():
        before = compile_released(model)(ids)
        with pytest.raises(ReleasedWeightError, match="this Plain cannot run eagerly"):
            model(ids)
        model.forward = torch.compile(
            model.forward, backend=effopt, options={**EAGER, "passes": "quantize-weights{bits=4,group=16}"}
        )
        assert torch.equal(model(ids), before)


def test_what_another_graph_reads_stays() -> None:
    model, x = layers(), torch.randn(5, 32)
    other = torch.compile(model, backend=effopt, options=EAGER)
    with torch.no_grad():
        want = other(x)
        with record() as report:
            compile_released(model)(x)
        freed, kept = records(report)
        assert not freed
        assert sorted(kept) == [f"{n}.weight stays: a compiled graph reads the original" for n in (0, 2)]
        assert torch.equal(other(x), want)
        assert torch.equal(model(x), want)


@pytest.mark.parametrize(
    "passes", ["", "quantize-weights{bits=8}", "quantize-weights{bits=4,group=16,exclude=2*}"]
)
def test_a_graph_that_needs_the_original_is_an_error(passes: str) -> None:
    model, _, x, _ = released_layers()
    with (
        torch.no_grad(),
        pytest.raises(BackendCompilerFailed, match="freed by option 'release_weights'") as caught,
    ):
        torch.compile(model, backend=effopt, options={**EAGER, "passes": passes})(x)
    assert isinstance(caught.value.inner_exception, ReleasedWeightError)


def test_code_that_runs_eagerly_inside_is_an_error() -> None:
    _, compiled, _, _ = released_layers()
    with (
        torch.no_grad(),
        pytest.raises((BackendCompilerFailed, RuntimeError), match=r"freed|storage of size 0"),
    ):
        compiled(torch.eye(32).to_sparse())


def test_code_of_another_model_is_not_run_on_freed_weights() -> None:
    """The second model runs the code that was compiled for the first, which never saw its parameters."""
    first, second, x = layers(), layers(), torch.randn(5, 32)
    plain = [torch.compile(m, backend=effopt, options=EAGER) for m in (first, second)]
    with torch.no_grad():
        for compiled in plain:
            compiled(x)
        compile_released(second)(x)
        assert second[0].weight.untyped_storage().nbytes() == 0
        with pytest.raises(ReleasedWeightError, match=r"0\.weight was freed"):
            plain[1](x)
        assert torch.equal(plain[0](x), first(x))


def test_forgotten_code_is_compiled_again_from_what_was_kept() -> None:
    _, compiled, x, before = released_layers()
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(compiled(x), before)


def test_a_state_that_is_assigned_brings_the_model_back() -> None:
    model, compiled, x, before = released_layers()
    model.load_state_dict(layers().state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), layers()(x))
        torch.testing.assert_close(compiled(x), before)
        model.load_state_dict({k: 2 * v for k, v in layers().state_dict().items()}, assign=True)
        assert not torch.equal(compiled(x), before)


def test_a_model_that_is_whole_again_is_copied_and_saved_as_any_other() -> None:
    model, compiled, x, before = released_layers()
    model.load_state_dict(layers().state_dict(), assign=True)
    copied = copy.deepcopy(model)
    copied.half()
    assert [p.dtype for p in copied.parameters()] == [torch.float16] * len(list(model.parameters()))
    assert not any(p.dtype == torch.float16 for p in model.parameters())
    torch.save(model, io.BytesIO())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), before)


def test_training_frees_nothing() -> None:
    model, x = layers(), torch.randn(5, 32)
    with record() as report:
        compile_released(model)(x).sum().backward()
    assert records(report) == ([], [])
    assert model[0].weight.grad is not None


def test_packed_projections_replace_their_weights() -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(24, 16, bias=False), nn.Linear(24, 8, bias=False)

        def forward(self, x: torch.Tensor) -> Any:
            return self.q(x), self.k(x)

    model, x = Projections(), torch.randn(5, 24)
    with torch.no_grad():
        want = model(x)
        compiled = compile_released(model, "pack-projections")
        for _ in range(2):
            for a, b in zip(compiled(x), want, strict=True):
                torch.testing.assert_close(a, b)
    assert resident(model) == 0


@pytest.mark.parametrize("name", sampled(["gpt2", "t5-encoder"], "gpt2"))
def test_through_inductor(name: str) -> None:
    model, inputs = build(name, **({"n_layer": 1, "num_hidden_layers": 1} if name == "gpt2" else {}))
    settings = {"passes": "quantize-weights{bits=8}", "lowering": "auto"}
    with torch.no_grad():
        want = main_output(torch.compile(copy.deepcopy(model), backend=effopt, options=settings)(**inputs))
        torch._dynamo.reset()
        compiled = compile_released(model, **settings)
        for _ in range(2):
            torch.testing.assert_close(main_output(compiled(**inputs)), want)
