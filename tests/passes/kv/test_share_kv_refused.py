"""Caches and layers that share nothing, and plans that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effopt
from effopt.errors import PlanError
from effopt.passes.kv.share_kv_across_layers import ShareKVAcrossLayers
from tests.models import architectures
from tests.passes.kv.models import NAME, compiled, model_and_inputs, planned


class Writing(nn.Module):
    """Layers that write their keys in place and also return them, as no caller could keep apart."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for step, cache in zip(self.steps, held, strict=True):
            q, k, v = (t.transpose(1, 2) for t in step(x).unflatten(-1, (-1, 4)).chunk(3, -2))
            cache.copy_(k)
            x = x + F.scaled_dot_product_attention(q, cache, v).transpose(1, 2).flatten(2)
            kept.append(cache[:, :1])
        return (x, *kept)


def reasons(model: Any, *inputs: Any, passes: str = NAME, **named: Any) -> list[str]:
    with effopt.record() as report, torch.no_grad():
        compiled(model, passes=passes)(*inputs, **named)
    assert NAME not in report.counts
    return [r.reason for r in report.rejected if r.pass_name == NAME]


def test_views_of_a_written_cache_are_refused() -> None:
    held = [torch.zeros(2, 4, 5, 4) for _ in range(2)]
    (reason,) = reasons(Writing(), torch.randn(2, 5, 16), *held)
    assert "it returns a cache that it also writes in place" in reason


def test_sliding_and_full_attention_share_nothing() -> None:
    model, inputs = architectures.build("gemma2", num_hidden_layers=4)
    found = reasons(model, **inputs)
    assert len(found) == 2
    assert all("its bias is not that of model.layers." in reason for reason in found)


def test_model_without_attention_has_a_reason() -> None:
    layers = nn.Sequential(*(Gated() for _ in range(2)))
    (reason,) = reasons(layers, torch.randn(2, 5, 16))
    assert reason == "0, 1 share nothing: 1 holds no attention that was recognised"


class Gated(nn.Module):
    """A layer without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


def test_unknown_layers_have_a_reason() -> None:
    model, inputs = model_and_inputs("llama")
    (reason,) = reasons(model, passes=f"{NAME}{{include=model.layer.*}}", **inputs)
    assert reason == "include=model.layer.* is none of model.layers.0 to model.layers.3"


def test_include_makes_groups_of_neighbours() -> None:
    model, inputs = model_and_inputs("llama")
    chosen = ShareKVAcrossLayers(group=3, include="model.layers.[123]")
    with effopt.record() as report, torch.no_grad():
        compiled(model, passes=chosen)(**inputs)
    (section,) = report.graphs[0].planned
    assert [entry.decision for entry in section.stacks[0].layers] == [None, None, 1, 1]


def test_plan_of_another_model_is_an_error() -> None:
    model, inputs = model_and_inputs("llama")
    other, _ = architectures.build("llama", num_hidden_layers=3)
    plan = planned(other)
    with torch.no_grad(), pytest.raises(Exception, match="it has 4 layers, the plan 3") as raised:
        compiled(model, plans=plan)(**inputs)
    assert isinstance(raised.value, PlanError) or "PlanError" in str(raised.value)


def test_plan_that_a_graph_does_not_allow_is_an_error() -> None:
    gemma, inputs = architectures.build("gemma2", num_hidden_layers=4)
    text = effopt.calibrate(gemma, [inputs], NAME).to_json()
    first, second = text.split('"decision": null', 1)[0], text.split('"decision": null', 1)[1]
    plan = effopt.Plan.from_json(
        first + '"decision": null' + second.replace('"decision": null', '"decision": 0', 1)
    )
    with (
        torch.no_grad(),
        pytest.raises(Exception, match="cannot be carried out in this graph: its bias is not"),
    ):
        compiled(gemma, plans=plan)(**inputs)
