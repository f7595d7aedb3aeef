"""The recall model: what it reads, that it recalls, and what the committed figures of passes on it say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import effopt
from effopt.testing import quality

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "recall_lm"
TINY_LM = str(ROOT / "examples" / "tiny_lm")
before = list(sys.path)
sys.path.insert(0, str(EXAMPLE))
sys.path.append(TINY_LM)
try:
    recall_model, sequences, train_recall, schedule = (
        importlib.import_module(name) for name in ("recall_model", "sequences", "train_recall", "schedule")
    )
finally:
    sys.path[:] = before

TIER = quality.Tier(context=sequences.LENGTH, stride=sequences.LENGTH, rows=8, resamples=10)
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("length", [64, 512])
def test_a_question_is_answered_by_its_fact(length: int) -> None:
    facts, questions = sequences.counts_in(length)
    tokens, weights = sequences.sequence(length, facts, questions, np.random.default_rng(3))
    assert (len(tokens), len(weights), tokens[0]) == (length, length - 1, sequences.BEGIN)
    known: dict[int, int] = {}
    filler, asked, at = [], 0, 1
    while at < length:
        token, weight = int(tokens[at]), weights[at - 1]
        if token < sequences.KEY:
            filler.append(token)
            assert weight == 1
        elif token >= sequences.FACT:
            key, value = divmod(token - sequences.FACT, sequences.VALUES)
            assert key not in known
            known[key] = value
            assert weight == 0
        else:
            asked, at = asked + 1, at + 1
            assert tokens[at] == sequences.VALUE + known[token - sequences.KEY]
            assert (weight, weights[at - 1]) == (0, 1)
        at += 1
    assert (len(known), asked, len(filler)) == (facts, questions, length - 1 - facts - 2 * questions)
    table = sequences.following()
    assert all(c in table[a, b] for a, b, c in zip(filler, filler[1:], filler[2:], strict=False))


def test_batch_is_a_function_of_its_arguments() -> None:
    one, again, other = (sequences.batch(5, step, 3, 96, 4.0) for step in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert int((one[1] == 4).sum()) == 3 * sequences.counts_in(96)[1]


def test_probes_have_their_distance() -> None:
    for probe in sequences.probes(3):
        tokens, (start, end) = probe.tokens.tolist(), probe.answer
        assert (len(tokens), start, end) == (sequences.LENGTH, sequences.LENGTH - 1, sequences.LENGTH)
        key, value = tokens[-2] - sequences.KEY, tokens[-1] - sequences.VALUE
        facts = range(sequences.FACT + key * sequences.VALUES, sequences.FACT + (key + 1) * sequences.VALUES)
        (stated,) = (i for i, token in enumerate(tokens) if token in facts)
        assert tokens[stated] == facts[value]
        assert end - stated == probe.distance
        assert tokens.count(tokens[-2]) == 1


def test_training_is_repeatable() -> None:
    plan = schedule.Plan.parse("32x2:2,48x1:1:decay")
    one, again = (train_recall.trained(plan, 0, 1e-3) for _ in range(2))
    for ours, theirs in zip(one.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_checkpoint_is_small_and_its_numbers_are_its_own() -> None:
    weights = recall_model.CHECKPOINT / "model.safetensors"
    numbers = json.loads((recall_model.CHECKPOINT / "numbers.json").read_text())
    beside = (recall_model.CHECKPOINT / "model.safetensors.sha256").read_text()
    assert weights.stat().st_size < 2e6
    assert beside == f"{numbers['sha256']}  model.safetensors\n"
    recall = [value for name, value in numbers["metrics"].items() if name.startswith("recall@")]
    assert len(recall) == len(sequences.DISTANCES)
    assert all(interval["low"] > 0.95 for interval in recall)


def test_the_trained_model_recalls_at_each_distance() -> None:
    model = recall_model.load()
    found = quality.evaluate(model, sequences.texts(2), probes=sequences.probes(24), tier=TIER)
    assert set(found.recall) == set(sequences.DISTANCES)
    for distance, recall in found.recall.items():
        assert recall.value > 0.95, distance


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    run = torch.compile(model, backend="effopt", options={"lowering": "eager", **options})
    with torch.no_grad():
        return run(ids).logits


@pytest.mark.parametrize(
    "spec",
    [
        "select-blocks-by-antidiagonal{block=16,threshold=1.0}",
        pytest.param("keep-sink-and-local-blocks{block=16,sink=16,window=512}", marks=pytest.mark.slow),
        pytest.param("stride-blocks-by-head{block=16,window=32,stride=1}", marks=pytest.mark.slow),
    ],
)
def test_all_blocks_are_the_dense_model(spec: str) -> None:
    model, ids = recall_model.load(), sequences.probes(1)[-1].tokens[None]
    with torch.no_grad():
        dense = model(ids).logits
    torch.testing.assert_close(logits(model, ids, passes=spec), dense, rtol=1e-4, atol=1e-4)


def rows_of(table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"retrieval-{table}-cpu.json").read_text())["rows"]
    return rows


@pytest.mark.parametrize(("table", "knob", "count"), [("heads", "retrieval", 1), ("blocks", "density", 4)])
def test_committed_rows_that_see_all_are_the_dense_model(table: str, knob: str, count: int) -> None:
    rows, dense = rows_of(table), rows_of("blocks")[0]
    whole = [row for row in rows if row[knob] == 1.0]
    assert dense["passes"] == "dense"
    assert len(whole) == count < len(rows)
    for row in whole:
        assert row["attention_recall"] == pytest.approx(1.0, abs=1e-6)
        assert row["agreement"]["value"] == 1.0
        assert abs(row["kl"]["value"]) < 1e-6
        assert row["bits_per_byte"]["value"] == pytest.approx(dense["bits_per_byte"]["value"], abs=1e-6)
        for name in (f"recall@{d}" for d in sequences.DISTANCES):
            assert row[name] == dense[name]
            assert row[name]["value"] > 0.95


def test_calibration_finds_the_heads_that_retrieve() -> None:
    """In a quarter of the heads, and what the others hold is not it: as committed, and calibrated anew."""
    rows = {(row["retrieval"], row["by"]): row for row in rows_of("heads")}
    far = [f"recall@{d}" for d in sequences.DISTANCES if d > 32]
    assert all(rows[0.25, "calibration"][name]["low"] > 0.95 for name in far)
    assert all(rows[0.75, "the other way round"][name]["high"] < 0.5 for name in far)
    batches = [text.tokens[None, : sequences.LENGTH] for text in sequences.texts(2)]
    spec = "split-heads-by-role{retrieval=0.25,sink=4,recent=32}"
    plan = effopt.calibrate(recall_model.load(), batches, spec)
    kept = {e.path: (e.decision or {}).get("streaming", []) for e in plan.sections[0].entries}
    assert kept == rows[0.25, "calibration"]["streaming"]
    probes = sequences.probes(8, (64, 480))
    ids = torch.stack([probe.tokens for probe in probes])
    chosen = logits(recall_model.load(), ids, plans=plan)[:, -2].argmax(-1)
    assert torch.equal(chosen, ids[:, -1])
