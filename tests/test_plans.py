"""Plans: decided once, the same in every graph of a model, and never carried out by half."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.fx import Graph

import effopt
from effopt.graph.analyses.layers import Stack
from effopt.graph.rewrite import PassResult, require
from tests.models.architectures import build


@dataclass(frozen=True)
class BypassLayers(effopt.RegionPass):
    """Replaces the layers with the lowest scores by the identity."""

    name: ClassVar[str] = "bypass-layers"
    stage: ClassVar[effopt.Stage] = effopt.Stage.LAYERS
    is_scored: ClassVar[bool] = True
    count: int = effopt.option(1, "layers to bypass", min=0)
    refuses_one_token: bool = effopt.option(False, "for tests: what only some graphs allow")

    def score(self, *values: torch.Tensor) -> torch.Tensor:
        entry, exit_ = values
        return (exit_ - entry).norm(dim=-1) / entry.norm(dim=-1)

    def decide(self, stack: Stack, scores: Sequence[float] | None, result: PassResult) -> list[str | None]:
        assert scores is not None
        lowest = sorted(range(len(scores)), key=scores.__getitem__)[: self.count]
        return ["bypass" if i in lowest else None for i in range(len(scores))]

    def enact(self, stack: Stack, decisions: Sequence[Any], graph: Graph, result: PassResult) -> None:
        for layer, decision in zip(stack.layers, decisions, strict=True):
            if decision is not None:
                tokens = layer.exit.meta["val"].shape[1]
                require(not self.refuses_one_token or tokens != 1, "it has one token", layer.exit)
                layer.exit.replace_all_uses_with(layer.entry)
                result.apply(self.name, "identity", layer.exit)


class Plugin:
    @effopt.hookimpl
    def effopt_passes(self) -> list[type[effopt.Pass]]:
        return [BypassLayers]


PLUGINS = [Plugin()]


def llama(layers: int = 4) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model whose third layer adds almost nothing to its stream."""
    model, inputs = build("llama", num_hidden_layers=layers)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(1e-3)
        model.model.layers[2].mlp.down_proj.weight.mul_(1e-3)
    return model, inputs


def plan_of(model: nn.Module, inputs: Any, spec: str = "bypass-layers") -> effopt.Plan:
    return effopt.calibrate(model, [inputs], spec, plugins=PLUGINS)


@functools.cache
def plan_of_llama() -> effopt.Plan:
    return plan_of(*llama())


def run(model: nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        settings = {"lowering": "eager", "plugins": PLUGINS, **options}
        return torch.compile(model, backend="effopt", options=settings)(**inputs).logits


def test_calibration_finds_the_layer_that_does_least() -> None:
    model, inputs = llama()
    plan = plan_of(model, inputs)
    (stack,) = plan.sections[0].stacks
    assert [e.path for e in stack.layers] == [f"model.layers.{i}" for i in range(4)]
    assert [e.decision for e in stack.layers] == [None, None, "bypass", None]
    assert {e.kind for e in stack.layers} == {"LlamaDecoderLayer"}
    assert stack.width == 64
    scores = [e.score for e in stack.layers]
    assert scores[2] is not None
    assert scores[2] < 0.01 < min(s for i, s in enumerate(scores) if i != 2 and s)
    assert "model.layers.2" in str(plan)
    assert '"bypass"' in str(plan)


def test_scores_are_means_over_all_batches() -> None:
    model, _ = llama()
    ids = torch.randint(3, 100, (3, 10))
    whole = plan_of(model, {"input_ids": ids})
    parts = effopt.calibrate(
        model, ({"input_ids": row[None, :length]} for row, length in zip(ids, (10, 10, 10), strict=True)),
        "bypass-layers", plugins=PLUGINS,
    )  # fmt: skip
    for a, b in zip(whole.sections[0].stacks[0].layers, parts.sections[0].stacks[0].layers, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-5)


def test_batches_of_many_lengths_are_one_pass() -> None:
    model, _ = llama()
    batches = [torch.randint(3, 100, (2, length)) for length in (5, 9, 13, 4, 2)]
    plan = effopt.calibrate(model, batches, "bypass-layers", plugins=PLUGINS)
    with torch.no_grad():
        hidden = [model(b, output_hidden_states=True).hidden_states[:2] for b in batches]
    changes = torch.cat([((b - a).norm(dim=-1) / a.norm(dim=-1)).flatten() for a, b in hidden])
    assert plan.sections[0].stacks[0].layers[0].score == pytest.approx(float(changes.mean()), rel=1e-4)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = plan_of_llama()
    plan.save(tmp_path / "plan.json")
    again = effopt.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a plan"),
        ("[]", "not a plan"),
        ('{"format": "effopt-plan/9", "sections": []}', "effopt-plan/9"),
        ('{"format": "effopt-plan/1", "sections": [{"pass": "x"}]}', "not a plan"),
    ],
)
def test_what_is_no_plan(text: str, words: str) -> None:
    with pytest.raises(effopt.PlanError, match=words):
        effopt.Plan.from_json(text)


def test_a_plan_runs_its_pass_in_every_graph() -> None:
    model, _ = llama()
    plan = plan_of_llama()
    compiled_for = [(2, 12), (1, 5), (3, 1)]
    outputs = [run(model, {"input_ids": torch.ones(s, dtype=torch.long)}, plans=plan) for s in compiled_for]
    del model.model.layers[2]
    for shape, got in zip(compiled_for, outputs, strict=True):
        torch.testing.assert_close(got, model(torch.ones(shape, dtype=torch.long)).logits)


def test_a_scored_pass_needs_a_plan() -> None:
    model, inputs = llama()
    with pytest.raises(Exception, match=r"plan = effopt\.calibrate\(model, batches, 'bypass-layers'\)"):
        run(model, inputs, passes="bypass-layers")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: build("llama", num_hidden_layers=3), "it has 3 layers, the plan 4"),
        (lambda: build("qwen3", num_hidden_layers=4), "Qwen3DecoderLayer, planned was 'LlamaDecoderLayer'"),
        (lambda: build("llama", num_hidden_layers=4, hidden_size=32, head_dim=8), "32 wide, planned was 64"),
        (lambda: build("gpt2", n_layer=4), "it has no layer 'transformer.h.0'"),
    ],
)  # fmt: skip
def test_a_plan_of_another_model_names_the_first_difference(other: Any, words: str) -> None:
    plan = plan_of_llama()
    model, inputs = other()
    with pytest.raises(Exception, match=words) as error:
        run(model, inputs, plans=plan)
    assert "PlanError" in str(error.value) or isinstance(error.value, effopt.PlanError)


def test_a_graph_that_cannot_carry_the_plan_is_an_error() -> None:
    model, inputs = llama()
    plan = plan_of(model, inputs, "bypass-layers{refuses_one_token=true}")
    run(model, inputs, plans=plan)
    with pytest.raises(Exception, match="cannot be carried out in this graph: it has one token"):
        run(model, {"input_ids": inputs["input_ids"][:, :1]}, plans=plan)


def test_a_graph_whose_layers_cannot_be_told_apart_is_an_error() -> None:
    """A plan for it is not passed over: the model would be trained whole and used in part."""
    model, inputs = build("llama", num_hidden_layers=4)
    plan = effopt.calibrate(model, [inputs], "skip-layers{keep=0.5}")
    model.train()
    model.activation_checkpointing_enable()
    compiled = torch.compile(model, backend="effopt", options={"plans": plan, "lowering": "eager"})
    with pytest.raises(Exception, match=r"this graph runs 'model\.layers\.1'.* gradient checkpointing"):
        compiled(**inputs, use_cache=False)


def test_graphs_that_would_decide_otherwise_are_an_error() -> None:
    model, inputs = llama()
    entries = plan_of_llama().sections[0].stacks[0].layers
    swapped = [replace(e, decision=None if e.decision else "bypass") for e in entries]

    @dataclass(frozen=True)
    class Moody(BypassLayers):
        is_scored: ClassVar[bool] = False

        def decide(self, stack: Stack, scores: Any, result: PassResult) -> list[str | None]:
            tokens = stack.layers[0].entry.meta["val"].shape[1]
            return [e.decision for e in (entries if tokens > 1 else swapped)]

    run(model, inputs, passes=Moody())
    with pytest.raises(
        Exception, match=r"'model.layers.0' stayed as it is in an earlier graph .* mix two models"
    ):
        run(model, {"input_ids": inputs["input_ids"][:, :1]}, passes=Moody())


def test_a_pass_that_its_plan_contradicts() -> None:
    model, inputs = llama()
    plan = plan_of_llama()
    with pytest.raises(
        Exception, match=r"bypass-layers\{count=2\} was asked for, and the plan is of bypass-layers"
    ):
        run(model, inputs, plans=plan, passes="bypass-layers{count=2}")
    with pytest.raises(Exception, match="two plans for 'bypass-layers'"):
        run(model, inputs, plans=[plan, plan])


@pytest.mark.parametrize(
    ("batches", "passes", "words"),
    [
        ([], "bypass-layers", "no batches"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], "remove-no-ops", "decides nothing by layer"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], "bypass-layer", "Did you mean 'bypass-layers'"),
    ],
)
def test_calibration_of_bad_input(batches: Any, passes: str, words: str) -> None:
    with pytest.raises(effopt.EffoptError, match=words):
        effopt.calibrate(llama()[0], batches, passes, plugins=PLUGINS)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    model, inputs = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(effopt.PlanError, match=r"'model\.layers\.1' is not finite"):
        plan_of(model, inputs)


def test_a_model_without_layers() -> None:
    with pytest.raises(effopt.PlanError, match="no stack of layers"):
        effopt.calibrate(nn.Linear(4, 4), [torch.randn(2, 4)], "bypass-layers", plugins=PLUGINS)


def test_no_graph_runs_without_the_plan_when_dynamo_stops_compiling() -> None:
    """Past the limit the function would run eagerly, with all layers."""
    model, _ = llama()
    settings = {"plans": plan_of_llama(), "lowering": "eager", "plugins": PLUGINS}
    compiled = torch.compile(model, backend="effopt", options=settings, dynamic=False)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):
        for length in (3, 4):
            compiled(torch.ones(1, length, dtype=torch.long))
        with pytest.raises(Exception, match=r"the last of 3 graphs .*recompile_limit"):
            compiled(torch.ones(1, 5, dtype=torch.long))


def test_layers_compiled_one_by_one_do_not_pass_a_plan_over() -> None:
    model, inputs = llama()
    for layer in model.model.layers:
        layer.compile(
            backend="effopt", options={"plans": plan_of_llama(), "lowering": "eager", "plugins": PLUGINS}
        )
    with torch.no_grad(), pytest.raises(Exception, match="compile the model whole"):
        model(**inputs)
