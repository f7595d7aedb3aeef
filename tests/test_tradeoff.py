"""What lossy passes cost and save: figures against models changed by hand, fronts, refusals, failures."""

from __future__ import annotations

import copy
import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import effopt
from effopt.decoding import storage_bytes
from effopt.errors import OptionError, PipelineError, QualityError
from effopt.quality.evaluate import evaluate
from effopt.quality.texts import Probe, Text, Tier
from effopt.tradeoff import AXES, Decoding, Row, Tradeoff, Way, measure
from effopt.tradeoff.contender import reader
from effopt.tradeoff.reference import Reference
from tests.models import eager_twin

pytestmark = pytest.mark.xdist_group("tradeoff")  # most tests read one result, which takes 20 s to make
TIER = Tier(context=32, stride=16, rows=2, resamples=100)
DECODING = Decoding(prompt_tokens=8, cache_tokens=40, rounds=3, steps=2)
SAME, FEWER, PAIRS = "skip-layers{keep=1}", "skip-layers{layers=[1]}", "share-kv-across-layers{group=2}"
ELSEWHERE, NO_SUCH = "share-kv-across-layers{include=encoder.*}", "skip-layers{layers=[9]}"
INT8, INT4 = "quantize-weights{bits=8}", "quantize-weights{bits=4,group=16}"
BOTH = f"{INT8},{ELSEWHERE}"


def draw(count: int, seed: int) -> Tensor:
    return torch.randint(3, 100, (count,), generator=torch.Generator().manual_seed(seed))


TEXTS = tuple(Text(f"text {i}", draw(70, i)) for i in range(3))
PROBES = tuple(Probe(draw(32, 10 + i), (20, 22), 16) for i in range(2))


@cache
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,  # the default, 0.02, makes every model predict nearly the same
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def run(*ways: Way | str, model: nn.Module | None = None, **settings: Any) -> Tradeoff:
    given = {"probes": PROBES, "tier": TIER, "decoding": DECODING, "lowering": "eager", **settings}
    texts = given.pop("texts", TEXTS)
    asked = [Way(way) if isinstance(way, str) else way for way in ways]
    return measure(llama() if model is None else model, texts, asked, **given)


@pytest.fixture(scope="module")
def result() -> Tradeoff:
    return run(FEWER, PAIRS, ELSEWHERE, NO_SUCH, BOTH)


def row_of(result: Tradeoff, passes: str) -> Row:
    return next(row for row in result.rows if row.way.passes == passes)


def test_rows_are_the_uncompressed_model_and_what_was_asked(result: Tradeoff) -> None:
    names = [row.way.name for row in result.rows]
    assert names == ["uncompressed", FEWER, PAIRS, ELSEWHERE, NO_SUCH, BOTH]


def test_nothing_lost_is_nothing_moved(result: Tradeoff) -> None:
    for passes in ("", ELSEWHERE):
        quality = row_of(result, passes).quality
        assert quality is not None
        assert quality.kl is not None
        assert quality.agreement is not None
        assert abs(quality.kl.value) < 1e-6
        assert quality.agreement.value == 1.0


@pytest.mark.parametrize("passes", [FEWER, PAIRS])
def test_quality_is_that_of_the_model_changed_by_hand(result: Tradeoff, passes: str) -> None:
    twin = copy.deepcopy(llama())
    if passes == FEWER:
        twin.model.layers = twin.model.layers[:1]
    else:
        eager_twin.share_keys_and_values(twin, 2)
    original = reader(llama().forward, llama())
    expected = evaluate(reader(twin.forward, twin), TEXTS, reference=original, probes=PROBES, tier=TIER)
    quality = row_of(result, passes).quality
    assert quality is not None
    for name, interval in expected.metrics.items():
        assert quality.metrics[name].value == pytest.approx(interval.value, abs=1e-5), name
    assert expected.kl is not None
    assert expected.kl.value > 0.01


def test_bytes_and_operations_are_those_of_what_is_left(result: Tradeoff) -> None:
    whole = result.rows[0]
    parameters = storage_bytes(llama().parameters())
    layer = storage_bytes(llama().model.layers[0].parameters())
    table = storage_bytes([llama().model.embed_tokens.weight])
    cache_bytes = 2 * 2 * 40 * 16 * 4  # of a layer: keys and values, heads, tokens, head size, float32
    assert whole.weight_bytes == parameters
    assert whole.kv_bytes == 2 * cache_bytes
    assert row_of(result, FEWER).weight_bytes == parameters - layer
    assert row_of(result, FEWER).kv_bytes == row_of(result, PAIRS).kv_bytes == cache_bytes
    int8 = row_of(result, BOTH).weight_bytes
    assert int8 is not None
    assert (parameters - table) / 4 < int8 - table < (parameters - table) / 3.5
    matmul = 2 * sum(p.numel() for n, p in llama().named_parameters() if p.dim() == 2 and "embed" not in n)
    for row, least in ((whole, matmul), (row_of(result, FEWER), matmul / 2)):
        assert row.flops_a_token is not None
        assert least < row.flops_a_token < 1.6 * least
    moved = [row_of(result, passes).bytes_a_token or 0.0 for passes in ("", PAIRS, FEWER, BOTH)]
    assert sorted(moved, reverse=True) == moved
    assert moved[-1] > 0


def test_every_row_that_decodes_is_timed_in_every_round(result: Tradeoff) -> None:
    for row in result.rows:
        assert len(row.decode_s) == (0 if row.error else 3)
        assert all(seconds > 0 for seconds in row.decode_s)
        speedup = result.speedup(row)
        assert (speedup is None) == (row is result.rows[0] or row.error is not None)


def test_what_was_refused_says_why_and_is_no_free_lunch(result: Tradeoff) -> None:
    refused = row_of(result, ELSEWHERE)
    assert refused.is_refused
    assert refused.applied == {"share-kv-across-layers": 0}
    assert ["include=encoder.* is none of" in left.reason for left in refused.untouched] == [True]
    for axis in AXES:
        on_front = dict(zip((row.way.passes for row in result.rows), result.front(axis), strict=True))
        assert not on_front[ELSEWHERE]
        assert on_front[""], axis.name


def test_half_of_a_pipeline_refused_is_told_and_still_compared(result: Tradeoff) -> None:
    row = row_of(result, BOTH)
    assert not row.is_refused
    assert row.applied == {"quantize-weights": 2 * 7 + 1, "share-kv-across-layers": 0}
    assert any(left.pass_name == "share-kv-across-layers" for left in row.untouched)


def test_a_row_that_raises_is_a_row_and_the_others_go_on(result: Tradeoff) -> None:
    row = row_of(result, NO_SUCH)
    assert row.error is not None
    assert row.error.startswith("OptionError: skip-layers: there is no layer 9")
    assert row.quality is None
    assert row.weight_bytes is None
    assert result.failed == (row,)
    assert not any(result.front(axis)[4] for axis in AXES)
    assert row_of(result, BOTH).quality is not None


def test_the_front_is_that_of_its_axis(result: Tradeoff) -> None:
    weights, kv = result.front(AXES[0]), result.front(AXES[1])
    on_weights = {row.way.passes for row, is_on in zip(result.rows, weights, strict=True) if is_on}
    on_kv = {row.way.passes for row, is_on in zip(result.rows, kv, strict=True) if is_on}
    assert {"", BOTH} <= on_weights
    assert PAIRS not in on_weights  # all but the later layers' projections, and worse than eight bits
    assert BOTH not in on_kv
    assert on_kv & {FEWER, PAIRS}


def test_the_result_is_json(result: Tradeoff) -> None:
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["format"] == "effopt-tradeoff/1"
    assert data["machine"]["torch"] == torch.__version__
    assert [row["passes"] for row in data["rows"]] == [row.way.passes for row in result.rows]
    assert data["rows"][0]["pareto"][:2] == ["weight_bytes", "kv_bytes"]
    assert set(data["rows"][5]["quality"]["metrics"]["kl"]) == {"value", "low", "high"}
    assert len(data["rows"][5]["decode_s"]) == 3


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
