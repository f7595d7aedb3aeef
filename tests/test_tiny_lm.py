"""The tiny language model: what it reads, how it is trained, measured and loaded."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch.nn import functional as F

from effopt.testing import quality

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny_lm"
sys.path.insert(0, str(EXAMPLE))
try:
    attention, data, evaluate, ngram, schedule, tiny, train = (
        importlib.import_module(name) for name in "attention data evaluate ngram schedule model train".split()
    )
finally:
    sys.path.remove(str(EXAMPLE))

NOTE = re.compile(rb"\n# note ([\x80-\xff]{4})([\x80-\xff]{16})\n")
RECALL = re.compile(rb"\n# recall ([\x80-\xff]{4})([\x80-\xff]{16})(?=\n|$)")


def text_of(row: Any) -> bytes:
    """The bytes of a row of tokens; BEGIN becomes NUL."""
    return bytes(c if c < 256 else 0 for c in row.tolist())


def test_split_is_by_name_and_disjoint() -> None:
    training, held_out = data.split()
    names = {s.name for s in training}, {s.name for s in held_out}
    assert not names[0] & names[1]
    assert len(training) + len(held_out) == len(data.sources())
    assert "threading.py" in names[1]
    assert "argparse.py" in names[0]
    assert 0.02 < len(held_out) / len(data.sources()) < 0.12
    assert not any(data.SKIPPED & set(s.name.split("/")) for s in data.sources())
    assert data.Source("threading.py", b"other text").is_held_out


def test_an_epoch_reads_every_window_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "training_tokens", lambda: np.arange(5000))
    data._order.cache_clear()
    count = 5000 // 64 - 2
    first, second = ([data.window(3, 64, e * count + i) for i in range(count)] for e in (0, 1))
    data._order.cache_clear()
    for epoch in (first, second):
        assert all(len(w) == 65 and (np.diff(w) == 1).all() for w in epoch)
        assert len({int(t) for w in epoch for t in w[:-1]}) == count * 64
    assert [w[0] for w in first] != [w[0] for w in second]


def test_batch_is_a_function_of_its_arguments() -> None:
    one, again, other = (data.batch(5, step, 3, 96, 12, 0.5) for step in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_answers_are_in_the_context_and_nothing_unknowable_is_asked(length: int) -> None:
    tokens, weights = data.batch(0, 1, 8, length, 0, recall_share=1.0, answer_weight=4.0)
    asked = 0
    for row, weight in zip(tokens, weights, strict=True):
        text = text_of(row)
        notes = {m[1]: m for m in NOTE.finditer(text)}
        for query in RECALL.finditer(text):
            note = notes[query[1]]
            assert note[2] == query[2]
            assert note.end() <= query.start() + 1
            assert (weight[query.start(2) - 1 : query.end(2) - 1] == 4).all()
            asked += 1
        hidden = {i for m in notes.values() for g in (1, 2) for i in range(*m.span(g))}
        assert {i + 1 for i in (weight == 0).nonzero().flatten().tolist()} == hidden
        assert int((weight == 4).sum()) == 16 * len(RECALL.findall(text))
        assert len(set(b"".join(m[1] + m[2] for m in notes.values()))) == 20 * len(notes)
    assert asked >= max(8, 8 * length // 160)


def test_without_recall_nothing_is_planted() -> None:
    tokens, weights = data.batch(0, 1, 2, 128, 5, recall_share=0.0, answer_weight=4.0)
    assert (weights == 1).all()
    assert (tokens[1] == torch.from_numpy(data.window(0, 128, 6))).all()


def test_recall_probes_have_their_distance() -> None:
    probes = evaluate.recall_probes(3)
    assert [p.distance for p in probes] == [256] * 3 + [512] * 3 + [1024] * 3
    for probe in probes:
        text = text_of(probe.tokens)
        (query,) = RECALL.finditer(text)
        note = next(m for m in NOTE.finditer(text) if m[1] == query[1])
        assert note[2] == query[2]
        assert query.end() - note.start() == probe.distance
        assert query.span(2) == probe.answer
        assert len(NOTE.findall(text)) == 5
        assert len(text) == 1024
    again = evaluate.recall_probes(2, [512])
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again, probes[3:], strict=False))


def test_held_out_texts_begin_with_the_token_before_their_first_byte() -> None:
    texts, (_, held_out) = evaluate.held_out_texts(), data.split()
    assert [t.name for t in texts] == [s.name for s in held_out]
    assert all(int(t.tokens[0]) == data.BEGIN for t in texts)
    assert all(bytes(t.tokens[1:].tolist()) == s.text for t, s in zip(texts, held_out, strict=True))


def test_a_pair_that_does_not_fit_is_an_error() -> None:
    text, symbols = np.zeros(100, dtype=np.int16), bytes(range(128, 148))
    with pytest.raises(ValueError, match="too short for a record and a query: 60 at least"):
        data.plant(text, 59, 0, symbols)
    with pytest.raises(ValueError, match="from 50 to 110 does not fit 100 tokens"):
        data.plant(text, 60, 50, symbols)


def test_ngram_is_a_distribution_and_counts() -> None:
    model = ngram.NGram.train([b"abab", b"abc"], order=2)
    whole = sum(model.probabilities(b"a" + bytes([c]))[1] for c in range(256))
    assert whole == pytest.approx(1.0)
    a, b = (3 + 3 / 256) / (7 + 3), (3 + 3 / 256) / (7 + 3)
    assert model.probabilities(b"ab") == pytest.approx([(2 + a) / (2 + 1), (3 + b) / (3 + 1)])
    text = b"the cat sat on the mat; the cat sat"
    assert ngram.NGram.train([text], 5).bits(text) < ngram.NGram.train([text], 1).bits(text)


@pytest.mark.parametrize("length", [100, 256, 300])
def test_attention_has_the_gradients_of_the_library_s(length: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, length, 32, requires_grad=True)
    k, v = (torch.randn(2, 2, length, 32, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, 4, length, 32)
    ours = attention.CausalAttention.apply(q, k, v, 0.17)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.17, enable_gqa=True)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    pairs = zip(
        torch.autograd.grad(ours, (q, k, v), grad),
        torch.autograd.grad(theirs, exact, grad.double()),
        strict=True,
    )
    for got, expected in pairs:
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


def small(plan: str) -> tuple[Any, Any]:
    whole = replace(schedule.Plan.parse(plan), warmup=2)
    attention.register()
    of = tiny.config(layers=1, hidden=64, context=128)
    return whole, train.Run.start(of, seed=0, attention=attention.NAME, rate=1e-2)


def steps(run: Any, plan: Any, count: int) -> list[float]:
    return [train.train_step(run, train.loss_of, plan, 0, 1e-2, 0.5)["bits"] for _ in range(count)]


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path) -> None:
    plan, whole = small("64x2:3,128x2:3:decay")
    losses = steps(whole, plan, 6)
    _, first = small("64x2:3,128x2:3:decay")
    before = steps(first, plan, 4)
    first.save(tmp_path / "state.pt", plan)
    _, second = small("64x2:3,128x2:3:decay")
    second.resume(tmp_path / "state.pt", plan)
    assert before + steps(second, plan, 2) == losses
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_stage_may_grow_but_not_change_behind_the_run(tmp_path: Path) -> None:
    plan, run = small("64x2:2")
    steps(run, plan, 2)
    run.save(tmp_path / "state.pt", plan)
    longer, again = small("64x2:3,128x1:1:decay")
    again.resume(tmp_path / "state.pt", longer)
    assert again.step == 2
    other, again = small("64x4:3")
    with pytest.raises(typer.BadParameter, match="trained for 2 steps as 64x2:2, but the plan has 64x4:2"):
        again.resume(tmp_path / "state.pt", other)


def test_training_goes_on_from_the_weights_of_the_checkpoint() -> None:
    trained = tiny.load()
    run = train.Run.start(tiny.config(), 1, "sdpa", 1e-3, tiny.CHECKPOINT)
    assert run.step == 0
    assert run.model.training
    for ours, theirs in zip(run.model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    plan = schedule.Plan.parse("128x2:1")
    assert train.train_step(run, train.loss_of, plan, 1, 1e-3, 0.0)["bits"] < 4  # of 8 without training


def test_the_rate_warms_up_and_decays_to_nothing() -> None:
    plan, _ = small("64x1:4,64x1:4:decay")
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert rates[:5] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.2
    assert [plan.tokens_before(step) for step in (0, 1, 4, 8)] == [0, 64, 256, 512]


@pytest.mark.parametrize("text", ["64x2:3", "64x2:3:answers=4", "64x2:3:answers=2.5:decay", "64x2:3:decay"])
def test_a_stage_is_written_as_it_is_read(text: str) -> None:
    assert str(schedule.Stage.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["64", "64x2", "64x2:3:slow", "ax2:3", "64x2:3:decay:decay", "64x2:3:answers="]
)
def test_a_stage_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected LENGTHxSIZE:STEPS"):
        schedule.Stage.parse(text)


def test_loading_checks_the_hash(tmp_path: Path) -> None:
    model = tiny.build(tiny.config(layers=1, hidden=64))
    with pytest.raises(tiny.CheckpointError, match=r"lacks model\.safetensors, config\.json, numbers\.json"):
        tiny.load(tmp_path)
    tiny.save(model, tmp_path)
    weights = tmp_path / tiny.WEIGHTS
    (tmp_path / tiny.NUMBERS).write_text(json.dumps({"sha256": tiny.sha256(weights)}))
    loaded = tiny.load(tmp_path)
    assert not loaded.training
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16).float())
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(tiny.CheckpointError, match="were measured on"):
        tiny.load(tmp_path)


def test_the_trained_model_compresses_better_than_zlib() -> None:
    model, names = tiny.load(), {"stat.py", "unittest/util.py", "xml/etree/__init__.py"}
    files = [s for s in data.split()[1] if s.name in names]
    texts = [t for t in evaluate.held_out_texts() if t.name in names]
    assert {s.name for s in files} == names
    found = quality.evaluate(model, texts, tier=quality.FULL)
    deflated = sum(map(evaluate.zlib_bits, files)) / sum(len(s.text) for s in files)
    assert found.bits_per_byte.value < deflated


def test_the_numbers_are_those_of_the_checkpoint() -> None:
    numbers = json.loads((tiny.CHECKPOINT / tiny.NUMBERS).read_text())
    bits = numbers["bits_per_byte"]
    assert bits["model"] < bits["5_gram"] < bits["zlib_9"]
    assert sum(f["model"] for f in numbers["bits"].values()) / sum(
        f["bytes"] for f in numbers["bits"].values()
    ) == pytest.approx(bits["model"], abs=1e-4)
    assert (tiny.CHECKPOINT / tiny.WEIGHTS).stat().st_size <= 20e6
    assert set(numbers["bits"]) == set(numbers["corpus"]["held_out_sha256"])
