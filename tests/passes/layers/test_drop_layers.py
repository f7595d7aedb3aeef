"""Dropped layers are those that calibration finds to do least; nothing is dropped without a plan."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effopt
from tests.models.architectures import build, sampled
from tests.models.eager_twin import relative
from tests.models.plain import Plain

FLOAT32 = 2e-5
NEAR_IDENTITY = (2, 5)


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """Six layers, two of which change the stream next to nothing."""
    model, inputs = build("llama", num_hidden_layers=6)
    with torch.no_grad():
        for i in NEAR_IDENTITY:
            model.model.layers[i].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[i].mlp.down_proj.weight.mul_(1e-3)
    return model, inputs


@functools.cache
def plan_of_llama() -> effopt.Plan:
    return effopt.calibrate(llama()[0], batches(), "drop-layers{keep=0.67}")


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, 100, (2, 7))} for _ in range(count)]


def run(model: nn.Module, inputs: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="effopt", options={"lowering": "eager", **options})(**inputs)


def decisions(plan: effopt.Plan) -> list[Any]:
    return [entry.decision for stack in plan.sections[0].stacks for entry in stack.layers]


def test_the_layers_that_do_least_are_dropped() -> None:
    model, inputs = llama()
    plan = plan_of_llama()
    assert decisions(plan) == ["drop" if i in NEAR_IDENTITY else None for i in range(6)]
    twin = copy.deepcopy(model)
    for i in reversed(NEAR_IDENTITY):
        del twin.model.layers[i]
    with torch.no_grad():
        want, original = twin(**inputs).logits, model(**inputs).logits
    got = run(model, inputs, plans=plan).logits
    assert relative(got, want) < FLOAT32
    # Two layers that do next to nothing: the model without them is nearly the model.
    assert relative(got, original) < 0.05


def test_importance_is_one_minus_the_cosine() -> None:
    model, _ = llama()
    plan = plan_of_llama()
    seen: list[list[Tensor]] = [[] for _ in range(6)]

    def note(position: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            read = (args[0] if args else kwargs["hidden_states"]).double()
            given = (output[0] if isinstance(output, tuple) else output).double()
            cosine = (read * given).sum(-1) / (read.norm(dim=-1) * given.norm(dim=-1))
            seen[position].append((1 - cosine).flatten())

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(note(i), with_kwargs=True)
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for entry, own in zip(plan.sections[0].stacks[0].layers, seen, strict=True):
        assert entry.score == pytest.approx(float(torch.cat(own).mean()), rel=1e-3, abs=1e-6)


def test_a_model_without_modules() -> None:
    model = Plain(5)
    with torch.no_grad():
        for name in ("o_3", "down_3"):
            getattr(model, name).mul_(1e-3)
    plan = effopt.calibrate(model, batches(), "drop-layers{keep=0.8}")
    assert decisions(plan) == [None, None, None, "drop", None]
    twin = copy.deepcopy(model)
    twin.order = [0, 1, 2, 4]
    inputs = batches()[0]
    with torch.no_grad():
        assert relative(run(model, inputs, plans=plan), twin(**inputs)) < FLOAT32


def test_gradients() -> None:
    model, inputs = llama()
    plan = plan_of_llama()
    torch._dynamo.reset()
    model.train()
    compiled = torch.compile(model, backend="effopt", options={"lowering": "eager", "plans": plan})
    compiled(**inputs).logits.sin().mean().backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for i in reversed(NEAR_IDENTITY):
        del twin.model.layers[i]
    twin(**inputs).logits.sin().mean().backward()
    for i, layer in enumerate(model.model.layers):
        gradients = [p.grad for p in layer.parameters()]
        assert all((g is None) == (i in NEAR_IDENTITY) for g in gradients)
    assert (
        relative(model.model.layers[0].mlp.up_proj.weight.grad, twin.model.layers[0].mlp.up_proj.weight.grad)
        < 2e-4
    )


@pytest.mark.parametrize("cache", sampled(["dynamic", "static"], "dynamic"))
def test_generate(cache: str) -> None:
    model, inputs = llama()
    model.config.use_cache = True
    plan = plan_of_llama()
    twin = copy.deepcopy(model)
    twin.model.layers = nn.ModuleList(
        layer for i, layer in enumerate(twin.model.layers) if i not in NEAR_IDENTITY
    )
    for position, layer in enumerate(twin.model.layers):
        layer.self_attn.layer_idx = position
    twin.config.num_hidden_layers = 4
    extra = {"cache_implementation": "static"} if cache == "static" else {}

    def tokens(model: nn.Module) -> list[list[int]]:
        ids = inputs["input_ids"]
        mask = torch.ones_like(ids)
        settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "disable_compile": True}
        return model.generate(ids, attention_mask=mask, **settings, **extra).tolist()

    expected = tokens(twin)
    torch._dynamo.reset()
    options = {"lowering": "eager", "plans": plan}
    model.forward = torch.compile(model.forward, backend="effopt", options=options)
    assert tokens(model) == expected


def test_keep_1_drops_nothing() -> None:
    model, inputs = Plain(4), batches()[0]
    plan = effopt.calibrate(model, batches(), "drop-layers{keep=1}")
    assert decisions(plan) == [None] * 4
    assert torch.equal(run(model, inputs, plans=plan), run(model, inputs))


def test_without_a_plan_it_says_how_to_make_one() -> None:
    model, inputs = llama()
    with pytest.raises(
        Exception, match=r"plan = effopt.calibrate\(model, batches, 'drop-layers\{keep=0.5\}'\)"
    ):
        run(model, inputs, passes="drop-layers{keep=0.5}")


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    plan_of_llama().save(tmp_path / "plan.json")
    plan = effopt.Plan.load(tmp_path / "plan.json")
    deeper, inputs = build("llama", num_hidden_layers=7)
    with pytest.raises(Exception, match="it has 7 layers, the plan 6"):
        run(deeper, inputs, plans=plan)
    other, inputs = build("gpt2")
    with pytest.raises(Exception, match=r"it has no layer 'transformer.h.0'"):
        run(other, inputs, plans=plan)


@pytest.mark.parametrize("keep", ["0", "2", "nan"])
def test_keep_out_of_range(keep: str) -> None:
    model, _ = llama()
    with pytest.raises(effopt.OptionError, match="option 'keep' must lie in"):
        effopt.calibrate(model, batches(), f"drop-layers{{keep={keep}}}")
