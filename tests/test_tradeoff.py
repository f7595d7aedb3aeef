"""What lossy passes cost and save: figures against models changed by hand, fronts, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from effopt.decoding import storage_bytes
from effopt.quality.evaluate import evaluate
from effopt.tradeoff import AXES, Tradeoff
from effopt.tradeoff.contender import reader
from tests.models import eager_twin
from tests.tradeoff_cases import (
    BOTH,
    ELSEWHERE,
    FEWER,
    NO_SUCH,
    PAIRS,
    PROBES,
    TEXTS,
    TIER,
    llama,
    row_of,
    run,
)

pytestmark = pytest.mark.xdist_group("tradeoff")  # most tests read one result, which takes 20 s to make


@pytest.fixture(scope="module")
def result() -> Tradeoff:
    return run(FEWER, PAIRS, ELSEWHERE, NO_SUCH, BOTH)


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
