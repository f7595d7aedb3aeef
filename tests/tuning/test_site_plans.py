"""Plans of sites: carried out to the letter, in every graph, or an error that names the first difference."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import effopt
from effopt.passes.plan import Entry, PlannedSites, Section
from tests.models.architectures import build

FORM = {"bits": 4, "group": 16, "symmetric": True}


def model_of(*widths: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(widths))).eval()


def plan_of(*decisions: Any, widths: tuple[int, ...] = (32, 48, 64, 32)) -> effopt.Plan:
    shapes = zip(widths[1:], widths, strict=False)
    entries = (
        Entry(str(i), f"linear [{n}, {k}]", decision)
        for i, (decision, (n, k)) in enumerate(zip(decisions, shapes, strict=False))
    )
    return effopt.Plan((Section("quantize-weights", graphs=(PlannedSites(tuple(entries)),)),))


PLAN = plan_of(FORM, None, {"bits": 8, "group": 0, "symmetric": False})


def run(model: nn.Module, plan: effopt.Plan, **options: Any) -> tuple[torch.Tensor, effopt.Report]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="effopt", options={"plans": plan, "lowering": "eager", **options})
    with effopt.record() as report:
        return compiled(torch.ones(3, 32)), report


@torch.no_grad()
def test_each_site_is_quantised_as_the_plan_says_and_the_rest_is_left() -> None:
    model = model_of(32, 48, 64, 32)
    got, report = run(model, PLAN)
    mixed = {
        "quantize-weights{bits=4,group=16,include=0*}": 0,
        "quantize-weights{symmetric=false,include=2*}": 2,
    }
    want = torch.ones(3, 32)
    for number, layer in enumerate(model):
        specs = [spec for spec, at in mixed.items() if at == number]
        torch._dynamo.reset()
        one = nn.Sequential(*(layer if i == number else nn.Identity() for i in range(3)))
        options = {"passes": specs, "lowering": "eager"}
        want = torch.compile(one, backend="effopt", options=options)(want) if specs else layer(want)
    assert torch.equal(got, want)
    (left,) = [r for r in report.rejected if r.pass_name == "quantize-weights"]
    assert (left.layer, left.reason) == ("1", "the plan leaves it as it is")
    (section,) = report.graphs[0].planned
    assert [e.decision for e in section.entries] == [e.decision for e in PLAN.sections[0].entries]


@pytest.mark.parametrize(
    ("model", "plan", "words"),
    [
        (model_of(32, 48, 64), PLAN, "it changes '2' together with sites that this graph does not have"),
        (model_of(32, 48, 64, 32, 32), PLAN, "it names no '3'"),
        (model_of(32, 56, 64, 32), PLAN, r"'0' is a linear \[56, 32\], planned was 'linear \[48, 32\]'"),
        (nn.Sequential(model_of(32, 48, 64, 32)).eval(), PLAN, r"it names no '0\.0' \(the nearest"),
        (
            model_of(32, 48),
            plan_of({**FORM, "group": 99}, widths=(32, 48)),
            "quantize-weights cannot be carried out at '0' in this graph: group=99 is more than a row has",
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_plan_of_another_model_names_the_first_difference(
    model: nn.Module, plan: effopt.Plan, words: str
) -> None:
    with pytest.raises(Exception, match=words) as error:
        run(model, plan)
    assert "PlanError" in repr(error.value) or isinstance(error.value, effopt.PlanError)


def test_training_under_a_plan_of_quantised_weights_is_an_error() -> None:
    with pytest.raises(Exception, match="cannot be carried out at '0' in this graph: training: the weights"):
        run(model_of(32, 48, 64, 32), PLAN)


def test_one_module_with_several_weights_has_a_site_for_each() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(32, 32)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.a), self.b)

    sites = (Entry("0.a", "linear [32, 32]", FORM), Entry("0.b", "linear [32, 32]", None))
    plan = effopt.Plan((Section("quantize-weights", graphs=(PlannedSites(sites),)),))
    with torch.no_grad():
        _, report = run(nn.Sequential(Two()).eval(), plan)
    assert report.ops["quantized_linear"] == 1


def test_formats_are_honest() -> None:
    """A plan without sites is one that older versions read; one with sites is one that they refuse."""
    assert json.loads(PLAN.to_json())["format"] == "effopt-plan/2"
    assert effopt.Plan.from_json(PLAN.to_json()) == PLAN
    assert "0: {" in str(PLAN)
    model, inputs = build("llama")
    old = effopt.calibrate(model, [inputs], "skip-layers")
    assert json.loads(old.to_json())["format"] == "effopt-plan/1"
    assert "graphs" not in old.to_json()
    mixed = replace(old, sections=(*old.sections, *PLAN.sections))
    assert effopt.Plan.from_json(mixed.to_json()) == mixed


def test_a_plan_with_sites_is_not_passed_over_by_a_graph_that_is_left_as_it_is() -> None:
    model = model_of(32, 48, 64, 32)
    compiled = torch.compile(
        model, backend="effopt", options={"plans": PLAN, "lowering": "eager"}, dynamic=False
    )
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        compiled(torch.ones(2, 32))
        with pytest.raises(Exception, match="this is the last of 2 graphs"):
            compiled(torch.ones(3, 32))
