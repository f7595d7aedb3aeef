"""Blocks kept between calls: when they are chosen, when read again, whose they are; all blocks are exact."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import effopt
from effopt.compile import effopt as backend
from effopt.compile import record
from effopt.errors import EffoptError, OptionError, PipelineError
from effopt.graph import ops
from effopt.graph.kept_blocks import _STATES

HEADS = 2
SELECT = "select-blocks-by-antidiagonal{block=16,least=32,threshold=0.4}"
ALL = "select-blocks-by-antidiagonal{block=16,least=32,threshold=1.0}"


class Denoiser(nn.Module):
    """Layers of self-attention over `[b, t, 16]`, as of a diffusion transformer."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q * 3.0, k, v)
            x = x + out.transpose(1, 2).flatten(2)
        return x


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries of every selection that is really run."""
    op = importlib.import_module("effopt.graph.ops.antidiagonal_blocks")
    seen, weigh = [], op._cell_weights

    def counted(query: Tensor, *rest: Any) -> Tensor:
        if not isinstance(query, FakeTensor):
            seen.append(tuple(query.shape))
        return weigh(query, *rest)

    monkeypatch.setattr(op, "_cell_weights", counted)
    return seen


def compile_model(model: nn.Module, select: str = SELECT, every: int = 3, **given: Any) -> Callable[..., Any]:
    passes = f"{select},reuse-blocks-between-steps{{every={every}}}"
    options = {"lowering": "eager", **given.pop("options", {}), "passes": passes}
    return torch.compile(model, backend=backend, options=options, **given)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def by_hand(model: Denoiser, x: Tensor, chosen_at: Tensor) -> Tensor:
    """The first layer of `model` on `x`, with the blocks that it chooses at `chosen_at`."""

    def parts(x: Tensor) -> Tensor:
        return model.layers[0](x).unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4)

    scale = 8**-0.5
    q, k, v = parts(x)
    chosen_q, chosen_k, _ = parts(chosen_at)
    blocks = ops.antidiagonal_blocks.reference(
        chosen_q * 3.0, chosen_k, block=16, stride=8, threshold=0.4, scale=scale
    )
    out = ops.block_sparse_attention.reference(q * 3.0, k, v, blocks, block=16, scale=scale)
    return x + out.transpose(1, 2).flatten(2)


@torch.no_grad()
def test_one_call_chooses_and_the_next_ones_read_its_blocks(choices: list[Any]) -> None:
    model = Denoiser()
    compiled = compile_model(model, every=3)
    steps = [torch.randn(1, 80, 16) for _ in range(7)]
    chosen = []
    for number, x in enumerate(steps):
        got = compiled(x)
        torch.testing.assert_close(got, by_hand(model, x, steps[number // 3 * 3]), rtol=1e-5, atol=1e-5)
        chosen.append(len(choices))
    # `by_hand` chooses once for each call.
    assert [n - i - 1 for i, n in enumerate(chosen)] == [1, 1, 1, 2, 2, 2, 3]
    assert (by_hand(model, steps[1], steps[0]) - by_hand(model, steps[1], steps[1])).abs().max() > 1e-3


@torch.no_grad()
def test_another_shape_chooses_and_so_does_the_first_one_after_it(choices: list[Any]) -> None:
    compiled = compile_model(Denoiser(), every=9, dynamic=False)
    for t in (64, 64, 96, 96, 64, 64):
        compiled(torch.randn(1, t, 16))
    assert [shape[2] for shape in choices] == [64, 96, 64]


@torch.no_grad()
def test_another_size_of_one_dynamic_graph_chooses(choices: list[Any]) -> None:
    model = Denoiser()
    with record() as report:
        compiled = compile_model(model, every=9, dynamic=True)
        steps = [torch.randn(1, t, 16) for t in (64, 64, 96, 96, 64)]
        got = [compiled(x) for x in steps]
    assert len(report.graphs) == 1
    assert [shape[2] for shape in choices] == [64, 96, 64]
    torch.testing.assert_close(got[3], by_hand(model, steps[3], steps[2]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_another_dtype_chooses(choices: list[Any]) -> None:
    model = Denoiser()
    compiled = compile_model(model, every=9)
    x = torch.randn(1, 64, 16)
    for dtype in (torch.float32, torch.float64, torch.float64, torch.float32):
        model.to(dtype)
        compiled(x.to(dtype))
    assert len(choices) == 3


@torch.no_grad()
def test_forgetting_has_the_next_call_choose(choices: list[Any]) -> None:
    model, other = Denoiser(), Denoiser()
    compiled = compile_model(model, every=9)
    x = torch.randn(1, 64, 16)
    effopt.forget_blocks(model)  # before the first call, when nothing is kept
    for forget in (other, other, compiled, model, other):
        compiled(x)
        effopt.forget_blocks(forget)
    assert len(choices) == 3


@torch.no_grad()
def test_forgetting_by_any_part_of_the_model(choices: list[Any]) -> None:
    """Not the first layer alone, whose parameter the state is found by."""
    model, other = Denoiser(layers=3), Denoiser(layers=3)
    compiled, x = compile_model(model, every=5), torch.randn(1, 80, 16)
    compile_model(other, every=5)(x)
    for part in (model.layers[2], model.layers[0], model.layers, nn.Sequential(model)):
        compiled(x)
        before = len(choices)
        compiled(x)
        assert len(choices) == before
        effopt.forget_blocks(other)
        compiled(x)
        assert len(choices) == before
        effopt.forget_blocks(part)
        compiled(x)
        assert len(choices) == before + 3
    with pytest.raises(EffoptError, match=r"Identity has no parameter.*the model that was compiled"):
        effopt.forget_blocks(nn.Identity())


@torch.no_grad()
def test_models_that_share_code_share_no_blocks(choices: list[Any]) -> None:
    models = [Denoiser(), Denoiser()]
    with record() as report:
        one, two = (compile_model(model, every=2) for model in models)
        for _ in range(2):
            for compiled in (one, two):
                compiled(torch.randn(1, 64, 16))
        x, y = torch.randn(2, 1, 64, 16)
        one(x)
        two(y)
        got = one(y), two(x)
    assert len(report.graphs) == 1  # Dynamo compiled once for both
    assert len(choices) == 4
    torch.testing.assert_close(got[0], by_hand(models[0], y, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], by_hand(models[1], x, y), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_another_parameter_in_its_place_chooses(choices: list[Any]) -> None:
    model = Denoiser()
    compiled = compile_model(model, every=9)
    x = torch.randn(1, 64, 16)
    compiled(x)
    model.layers[0].bias = nn.Parameter(torch.ones(48))
    compiled(x)
    compiled(x)
    assert len(choices) == 2


@torch.no_grad()
def test_what_a_dead_model_kept_is_freed() -> None:
    model = Denoiser()
    compiled = compile_model(model)
    compiled(torch.randn(1, 64, 16))
    kept = weakref.ref(next(iter(_STATES.values())))
    assert kept().blocks
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert kept() is None


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_all_blocks_are_the_model_at_every_step(dynamic: bool) -> None:
    model = Denoiser(layers=2)
    compiled = compile_model(model, ALL, every=3, dynamic=dynamic)
    for t in (64, 64, 80, 80):
        x = torch.randn(1, t, 16)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_call_that_fails_keeps_nothing(choices: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_model(Denoiser(), every=9)
    op = importlib.import_module("effopt.graph.ops.block_sparse_attention")
    x = torch.randn(1, 64, 16)
    compiled(x)
    effopt.forget_blocks(compiled)
    with monkeypatch.context() as broken:
        broken.setattr(op, "selected_keys", _planted)
        with pytest.raises(RuntimeError, match="planted"):
            compiled(x)
    compiled(x)
    assert len(choices) == 3


def _planted(*_: Any) -> Tensor:
    raise RuntimeError("planted")


def test_training_keeps_nothing() -> None:
    with record() as report:
        compile_model(Denoiser())(torch.randn(1, 64, 16))
    assert report.ops["attention"] == 1
    assert "block_sparse_attention" not in report.ops


def test_asking_for_it_without_a_selector_or_with_one_step_is_an_error() -> None:
    x = torch.randn(1, 64, 16)
    with pytest.raises(PipelineError, match="requires 'selected-blocks'"):
        effopt.explain(Denoiser(), x, options={"passes": "reuse-blocks-between-steps"})
    with pytest.raises(OptionError, match="'every' must lie in"):
        effopt.explain(Denoiser(), x, options={"passes": f"{SELECT},reuse-blocks-between-steps{{every=1}}"})


@pytest.mark.slow  # Inductor twice
@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_under_inductor_with_outlined_layers(dynamic: bool) -> None:
    model = Denoiser(layers=3)
    settings = {"options": {"lowering": "auto"}, "dynamic": dynamic}
    with record() as report:
        compiled = compile_model(model, every=2, **settings)
        steps = [torch.randn(1, t, 16) for t in (80, 80, 80, 96, 96)]
        got = [compiled(x) for x in steps]
    assert report.graphs[0].outlined
    torch._dynamo.reset()
    eagerly = compile_model(model, every=2, dynamic=dynamic)
    effopt.forget_blocks(model)
    for x, each in zip(steps, got, strict=True):
        torch.testing.assert_close(each, eagerly(x), rtol=1e-4, atol=1e-4)
