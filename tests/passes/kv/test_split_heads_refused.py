"""Attention and caches that are not split by role, each with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effopt
from effopt.cache_layout import build
from effopt.errors import PlanError
from effopt.passes.kv.split_heads_by_role import SplitHeadsByRole
from tests.models import architectures
from tests.models.eager_twin import relative
from tests.passes.kv.models import compiled
from tests.passes.kv.streaming_cases import NAME, STREAMS, batch, case, decisions, plan_of, small
from tests.test_caches import model_of, ordinary, prompt


def test_without_a_plan_it_says_how_to_make_one() -> None:
    with torch.no_grad(), pytest.raises(Exception, match=r"needs a plan: plan = effopt\.calibrate"):
        compiled(small("llama"), passes=NAME)(**batch())


def test_batches_that_are_too_short_are_an_error() -> None:
    with pytest.raises(Exception, match=r"must be longer than sink \+ recent, 68 tokens"):
        effopt.calibrate(small("llama"), [batch()], NAME)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mistral", "it is a sliding window already"),
        pytest.param("bert", "a query may see later keys", marks=pytest.mark.slow),
        pytest.param("t5-encoder", "it adds a bias", marks=pytest.mark.slow),
    ],
)
def test_attention_of_other_kinds_is_left_with_a_reason(name: str, reason: str) -> None:
    model, inputs = architectures.build(name)
    plan = effopt.calibrate(model, [inputs], f"{NAME}{{sink=1,recent=2}}")
    assert not any(decisions(plan).values())
    with effopt.record() as report, torch.no_grad():
        torch._dynamo.reset()
        compiled(model, passes=Scored(sink=1, recent=2))(**inputs)
    found = [r.reason for r in report.rejected if r.pass_name == NAME]
    assert found
    assert all(reason in r for r in found)


class Scored(SplitHeadsByRole):
    """Decides without scores: what stops it is then in the report of an ordinary call."""

    is_scored = False

    def decide(self, stack: Any, scores: Any, result: Any) -> Any:
        return super().decide(stack, [0.5] * len(stack.layers), result)


@pytest.mark.slow
def test_cross_attention_is_left_with_a_reason() -> None:
    model = model_of("t5")
    inputs = {**batch(), "decoder_input_ids": batch()["input_ids"]}
    with effopt.record() as report, torch.no_grad():
        compiled(model, passes=Scored(sink=1, recent=2))(**inputs)
    reasons = {r.reason for r in report.rejected if r.pass_name == NAME}
    assert any("holds 2 attention that was recognised, and one is needed" in r for r in reasons)


def test_cache_of_another_plan_is_an_error() -> None:
    model, plan, _ = case("llama")
    cache = effopt.cache_for(model, plan_of(model, STREAMS["grouped"], recent=4))
    run = compiled(model.forward, plans=plan)
    with torch.no_grad(), pytest.raises(Exception, match="the cache was made for another plan"):
        run(input_ids=prompt()[0], past_key_values=cache)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_split_cache_of_a_model_without_the_plan(is_compiled: bool) -> None:
    model, plan, _ = case("llama")
    cache = effopt.cache_for(model, plan)
    run = compiled(model.forward) if is_compiled else model.forward
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"of layer 0 \(model.layers.0\), and the model .*: compile it"),
    ):
        run(input_ids=prompt()[0], past_key_values=cache)


def test_tokens_are_not_given_back() -> None:
    model, plan, _ = case("llama")
    layer = effopt.cache_for(model, plan).layers[0]
    layer.crop(0)
    with pytest.raises(RuntimeError, match="cannot give back tokens"):
        layer.crop(-1)


def test_prompt_without_a_mask_over_a_static_cache() -> None:
    """`transformers` then hands on the keys of the prompt alone, a slice of the cache."""
    model, plan, twin = case("llama")
    run, ids = compiled(model.forward, plans=plan), prompt()[0]
    held = effopt.cache_for(model, plan, max_cache_len=16), ordinary(twin, 16)
    with torch.no_grad():
        got, want = (
            f(input_ids=ids, past_key_values=c).logits for f, c in zip((run, twin), held, strict=True)
        )
    assert relative(got, want) < 1e-5


def test_sliding_layers_keep_no_split_cache() -> None:
    config = model_of("gemma2").config
    decision = {"streaming": [0], "sink": 2, "recent": 5}
    with pytest.raises(PlanError, match="keeps a DynamicSlidingWindowLayer: its heads cannot keep"):
        build(config, set(), {}, {i: f"layer {i}" for i in range(4)}, splits={0: decision})
    with pytest.raises(PlanError, match="is skipped or shares its keys"):
        build(config, {2}, {}, {i: f"layer {i}" for i in range(4)}, splits={2: decision})
