"""`effopt.tune` on a model that has learned something (`examples/tiny_lm`)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import effopt
from effopt.testing.quality import Text, Tier, evaluate

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_lm"


@pytest.fixture(scope="module")
def tiny() -> Any:
    sys.path.insert(0, str(EXAMPLE))
    try:
        return importlib.import_module("model").load()
    finally:
        sys.path.remove(str(EXAMPLE))


def source_texts(count: int, length: int) -> list[Text]:
    """Python source, which is what the model knows: the files of this library."""
    files = sorted((EXAMPLE.parents[1] / "effopt" / "graph").glob("*.py"))
    texts = [path.read_bytes() for path in files]
    chosen = [(path.name, text) for path, text in zip(files, texts, strict=True) if len(text) > length][
        :count
    ]
    return [Text(name, torch.tensor([256, *text[:length]])) for name, text in chosen]


def judged(tiny: Any, plan: effopt.Plan, texts: list[Text], tier: Tier) -> float:
    """KL divergence as the quality harness has it, of the compiled plan on the validation texts."""
    torch._dynamo.reset()
    compiled = torch.compile(tiny, backend="effopt", options={"plans": plan, "lowering": "eager"})
    found = evaluate(compiled, texts[2::3], reference=tiny, tier=tier)
    assert found.kl is not None
    return found.kl.value


def test_a_budget_of_a_twentieth_of_a_nat_is_used_and_kept(tiny: Any) -> None:
    texts, tier = source_texts(6, 96), Tier(context=96, stride=96, rows=2, resamples=10)
    specs = ["skip-layers{layers=[0,5,6]}", "quantize-weights{bits=4,group=32,include=*.5.mlp.*|lm_head}"]
    plan = effopt.tune(tiny, texts, "kl<=0.05", specs, tier=tier)
    assert plan.report.accepted
    reported = plan.report.compressed["validation"]["kl"]
    assert 0 < reported <= 0.05
    assert judged(tiny, plan, texts, tier) == pytest.approx(reported, rel=1e-6)
    by_path = {c.path: c for c in plan.report.choices}
    assert by_path["model.layers.0"].budget_share > 10  # the first layer cannot be missed
    assert by_path["lm_head"].budget_share < 1


@pytest.mark.slow
def test_everything_that_is_registered_within_a_budget(tiny: Any) -> None:
    texts, tier = source_texts(6, 128), Tier(context=128, stride=128, rows=4, resamples=10)
    plan = effopt.tune(tiny, texts, "kl<=0.05", tier=tier, objective="bytes")
    assert len(plan.report.choices) >= 12 + 6 + 2 * 85
    assert plan.report.cost_after.bytes < 0.9 * plan.report.cost_before.bytes
    assert judged(tiny, plan, texts, tier) == pytest.approx(
        plan.report.compressed["validation"]["kl"], rel=1e-6
    )
