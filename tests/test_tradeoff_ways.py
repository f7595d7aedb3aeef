"""What a row may be: plans, sites, models without a cache; and what ends a comparison."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt.errors import OptionError, PipelineError, QualityError
from effopt.quality.texts import Tier
from effopt.tradeoff import Decoding, Way
from effopt.tradeoff.reference import Reference
from tests.tradeoff_cases import FEWER, INT4, INT8, PAIRS, SAME, TEXTS, run


class Bigram(nn.Module):
    """A language model without a cache, that `transformers` knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(100, 32), nn.Linear(32, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(tokens).tanh())
        return logits


class Stack(Bigram):
    """The same with three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits: Tensor = self.head(x)
        return logits


def test_a_plan_is_a_row_as_its_passes_are_and_the_same_again() -> None:
    model = Stack().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = effopt.calibrate(model, [TEXTS[0].tokens[None, :16]], FEWER)
    found = run(FEWER, Way(plan=plan, label="mine"), model=model, probes=())
    _, asked, planned = found.rows
    assert planned.way.name == "mine"
    assert asked.kl is not None
    assert asked.kl > 0.01
    assert planned.quality == asked.quality
    assert planned.weight_bytes == asked.weight_bytes
    again = run(FEWER, model=model, probes=())
    assert [row.quality for row in again.rows] == [row.quality for row in found.rows[:2]]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_pass_that_finds_nothing_to_do_is_no_success() -> None:
    plain, idle = run(SAME, model=Stack().eval(), probes=()).rows
    assert idle.is_refused
    assert [left.reason for left in idle.untouched] == ["found nothing to change"]
    for quality in (plain.quality, idle.quality):
        assert quality is not None
        assert quality.kl is not None
        assert quality.agreement is not None
        assert abs(quality.kl.value) < 1e-6
        assert quality.agreement.value == 1.0


def test_passes_that_decide_from_data_see_a_text_that_does_not_judge() -> None:
    row = run("drop-layers{keep=0.67}", model=Stack().eval(), probes=()).rows[1]
    assert row.error is None
    assert row.applied == {"drop-layers": 1}
    assert row.quality is not None
    assert [text.name for text in row.quality.texts] == ["text 0", "text 1"]
    with pytest.raises(QualityError, match="no texts to judge by but the one that passes decide from"):
        run("drop-layers{keep=0.67}", texts=TEXTS[:1])


def test_a_model_without_a_cache_is_judged_and_not_timed() -> None:
    plain, quantized = run(INT4, model=Bigram().eval(), probes=()).rows
    for row in (plain, quantized):
        assert row.error is None
        assert row.decode_s == ()
        assert row.kv_bytes is row.flops_a_token is None
        assert row.notes[0].startswith("decoding was not measured: Bigram has no key-value cache")
    assert quantized.kl is not None
    assert plain.kl is not None
    assert quantized.kl > 1e-5 > abs(plain.kl)
    assert quantized.weight_bytes is not None
    assert plain.weight_bytes is not None
    assert quantized.weight_bytes < plain.weight_bytes


def test_a_plan_of_sites_is_a_row() -> None:
    """As `effopt.tune` writes it."""
    model = Bigram().eval()
    batches = [text.tokens[None] for text in TEXTS]
    plan = effopt.tune(model, batches, budget="kl<=10", passes=[INT8, INT4])
    assert plan.sections[0].graphs
    found = run(Way(plan=plan), INT4, model=model, probes=())
    planned, asked = found.rows[1:]
    assert planned.error is None
    assert planned.applied == {"quantize-weights": 1}
    assert planned.kl in (asked.kl, run(INT8, model=model, probes=()).rows[1].kl)
    assert found.to_dict()["rows"][1]["plan"]["format"] == "effopt-plan/2"


def test_the_reference_runs_once_for_each_window_that_it_may_keep() -> None:
    model, seen = Bigram().eval(), []

    def counting(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return model(tokens)

    one, other = TEXTS[0].tokens[None, :8], TEXTS[1].tokens[None, :8]
    reference = Reference(counting, limit_bytes=8 * 100 * 4)
    for tokens in (one, other, one, other, one.view(2, 4)):
        assert torch.equal(reference(tokens), model(tokens))
    assert len(seen) == 4  # there was room for one window; the same tokens in two rows are another


def test_windows_fit_the_context() -> None:
    model = Bigram().eval()
    model.config = SimpleNamespace(max_position_embeddings=16)  # type: ignore[assignment]
    settings = run(model=model, probes=(), tier=Tier(rows=1, resamples=10)).settings
    assert (settings["tier"]["context"], settings["tier"]["stride"]) == (16, 8)
    assert settings["decoding"]["cache_tokens"] == 16
    long = run(model=model, probes=(), decoding=Decoding(prompt_tokens=99)).settings["decoding"]
    assert (long["cache_tokens"], long["prompt_tokens"]) == (16, 15)


@pytest.mark.parametrize(
    ("ways", "error", "words"),
    [
        (["skip-layer{keep=0.5}"], OptionError, "Did you mean 'skip-layers'"),
        (["skip-layers{kep=0.5}"], OptionError, "kep"),
        (["skip-layers{keep=0.5"], OptionError, "cannot read"),
        (["skip-layers,drop-layers"], PipelineError, "conflict"),
    ],
)
def test_passes_that_cannot_be_asked_for_end_it_before_anything_is_run(
    ways: list[str], error: type[Exception], words: str
) -> None:
    told: list[str] = []
    with pytest.raises(error, match=words):
        run(INT8, *ways, progress=told.append)
    assert told == []


def test_nothing_to_judge_by_is_an_error() -> None:
    with pytest.raises(QualityError, match="there are no texts to judge by: give more"):
        run(INT8, texts=())
    with pytest.raises(QualityError, match=r"in training mode.*call \.eval\(\)"):
        run(INT8, model=Bigram().train())
    with pytest.raises(OptionError, match="rounds must be at least 3"):
        Decoding(rounds=2)
    with pytest.raises(OptionError, match="the cache must hold 2"):
        Decoding(cache_tokens=1)


def test_a_figure_that_is_not_finite_fails_its_row() -> None:
    model = Bigram().eval()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    rows = run(INT8, model=model, probes=()).rows
    assert [row.error for row in rows] == [rows[0].error] * 2
    assert rows[0].error is not None
    assert "NaN" in rows[0].error


@pytest.mark.slow
def test_through_inductor() -> None:
    ways = INT8, f"{FEWER},{PAIRS}"
    found, eagerly = run(*ways, lowering="auto"), run(*ways)
    assert not found.failed
    for row, expected in zip(found.rows, eagerly.rows, strict=True):
        assert row.kl == pytest.approx(expected.kl, rel=1e-2, abs=1e-6)
        assert (row.weight_bytes, row.kv_bytes) == (expected.weight_bytes, expected.kv_bytes)
        assert len(row.decode_s) == 3
