"""The quality harness, on models whose figures are known without it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.errors import QualityError
from effopt.quality.bootstrap import Ratio, bootstrap
from effopt.testing.quality import FULL, QUICK, Probe, Quality, Text, Tier, evaluate

VOCABULARY = 11
SMALL = Tier(context=16, stride=8, rows=3, resamples=200)


def texts(*sizes: int) -> list[Text]:
    """Random tokens; all but the first size are drawn by the generator of that place."""
    return [
        Text(f"text {i}", torch.randint(VOCABULARY, (size,), generator=torch.Generator().manual_seed(i)))
        for i, size in enumerate(sizes)
    ]


def uniform(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, VOCABULARY)


def sure_of_the_same_again(strength: float) -> Callable[[Tensor], Tensor]:
    """A model that bets on the token before."""
    return lambda tokens: strength * F.one_hot(tokens, VOCABULARY).float()


def biased(amount: float) -> Callable[[Tensor], Tensor]:
    """The same distribution everywhere, token 0 raised by `amount`."""
    return lambda tokens: amount * F.one_hot(torch.zeros_like(tokens), VOCABULARY).float()


@pytest.mark.parametrize("size", [2, 16, 17, 18, 24, 25, 26, 100])
def test_each_token_is_counted_once_with_enough_before_it(size: int) -> None:
    seen: list[Tensor] = []

    def model(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return uniform(tokens)

    (text,) = texts(size)
    quality = evaluate(model, [text], tier=SMALL)
    assert quality.texts[0].tokens == quality.texts[0].bytes == size - 1
    assert quality.bits_per_byte.value == pytest.approx(math.log2(VOCABULARY))
    assert all(tokens.shape == (3, 16) for tokens in seen)


def test_windows_reach_back() -> None:
    """A model that knows a token from the eight before it is never asked with fewer, but at the beginning."""
    text = Text("count", torch.arange(100) % VOCABULARY)

    def model(tokens: Tensor) -> Tensor:
        ready = torch.arange(16) >= 7
        return 50.0 * F.one_hot((tokens + 1) % VOCABULARY, VOCABULARY).float() * ready[:, None]

    quality = evaluate(model, [text], tier=SMALL)
    unknown = 7 * math.log2(VOCABULARY) / 99
    assert quality.bits_per_byte.value == pytest.approx(unknown)


def test_bytes_are_those_of_the_predicted_tokens() -> None:
    text = Text("wide", torch.tensor([1, 2, 3]), torch.tensor([100, 3, 5]))
    assert evaluate(uniform, [text], tier=SMALL).bits_per_byte.value == pytest.approx(
        2 * math.log2(VOCABULARY) / 8
    )


def test_divergence_and_agreement_have_their_closed_form() -> None:
    p, q = (F.softmax(biased(a)(torch.zeros(1, 1, dtype=torch.int64))[0, 0], -1) for a in (2.0, 0.5))
    found = evaluate(biased(0.5), texts(40, 9), reference=biased(2.0), tier=SMALL)
    assert found.kl is not None
    assert found.kl.value == pytest.approx(float((p * (p / q).log()).sum()))
    assert found.agreement is not None
    assert found.agreement.value == 1.0
    opposite = evaluate(biased(-1.0), texts(40, 9), reference=biased(2.0), tier=SMALL)
    assert opposite.agreement is not None
    assert opposite.agreement.value == 0.0


def test_a_model_does_not_differ_from_itself() -> None:
    model = sure_of_the_same_again(3.0)
    found = evaluate(model, texts(50, 20), reference=model, tier=SMALL)
    assert (found.kl.value, found.kl.low, found.kl.high) == (0.0, 0.0, 0.0)
    assert found.agreement.value == 1.0


def test_without_a_reference_there_is_no_distance_from_it() -> None:
    found = evaluate(uniform, texts(5), tier=SMALL)
    assert found.kl is found.agreement is None
    assert list(found.metrics) == ["bits_per_byte"]


def test_a_reference_may_exclude_tokens_that_the_model_allows() -> None:
    def never_zero(tokens: Tensor) -> Tensor:
        logits = uniform(tokens)
        logits[..., 0] = -math.inf
        return logits

    found = evaluate(uniform, texts(30), reference=never_zero, tier=SMALL)
    assert found.kl.value == pytest.approx(math.log(VOCABULARY / (VOCABULARY - 1)))


def test_recall_needs_the_whole_answer() -> None:
    repeated = torch.tensor([5, 5, 5, 5, 7, 7, 5, 5])
    probes = [
        Probe(repeated, (2, 4), 4),
        Probe(repeated, (3, 5), 4),
        Probe(repeated, (5, 6), 6),
        Probe(repeated, (7, 8), 6),
    ]
    found = evaluate(sure_of_the_same_again(1.0), texts(5), probes=probes, tier=SMALL)
    assert {d: r.value for d, r in found.recall.items()} == {4: 0.5, 6: 1.0}
    assert found.hits == {4: (True, False), 6: (True, True)}
    assert (found.recall[4].low, found.recall[4].high) == (0.0, 1.0)


def test_logits_may_come_in_a_result() -> None:
    as_result = evaluate(lambda t: SimpleNamespace(logits=biased(1.0)(t)), texts(30), tier=SMALL)
    assert as_result == evaluate(biased(1.0), texts(30), tier=SMALL)


def test_equal_measurements_are_equal_and_seeds_matter() -> None:
    model, some = sure_of_the_same_again(0.3), texts(30, 60, 20, 45)
    first, again = (evaluate(model, some, tier=SMALL) for _ in range(2))
    assert first == again
    assert json.dumps(first.to_dict()) == json.dumps(again.to_dict())
    other = evaluate(model, some, tier=Tier(context=16, stride=8, rows=3, resamples=200, seed=1))
    assert other.bits_per_byte.value == first.bits_per_byte.value
    assert other.bits_per_byte != first.bits_per_byte
    assert str(first).startswith(" bits_per_byte  ")


def test_difference_is_paired() -> None:
    """Texts differ far more than the models do: only a paired interval can tell the two apart."""
    some = [Text(f"{i}", torch.tensor([0] * (5 + i) + [1] * (95 - i))) for i in range(0, 90, 9)]
    better, worse = (evaluate(biased(a), some, tier=SMALL) for a in (1.1, 1.0))
    assert worse.bits_per_byte.low < better.bits_per_byte.value < worse.bits_per_byte.value
    moved = worse.difference(better)["bits_per_byte"]
    assert moved.value == pytest.approx(worse.bits_per_byte.value - better.bits_per_byte.value)
    assert 0 < moved.low < moved.value < moved.high
    same = better.difference(better)["bits_per_byte"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_difference_compares_recall_probe_by_probe() -> None:
    tokens = torch.tensor([5, 5, 5, 5, 7, 7, 5, 5])
    probes = [Probe(tokens, (2, 4), 4), Probe(tokens, (3, 5), 4)]
    kept, lost = (
        evaluate(model, texts(5), probes=probes, tier=SMALL)
        for model in (sure_of_the_same_again(1.0), sure_of_the_same_again(-1.0))
    )
    assert lost.difference(kept)["recall@4"].value == -0.5


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(300):
        members = torch.rand(40, generator=generator, dtype=torch.float64)
        found = bootstrap(Ratio.of(members.tolist()), 400, seed)
        inside += found.low <= 0.5 <= found.high
    assert 0.90 < inside / 300 <= 0.98


def test_one_text_has_no_spread() -> None:
    found = evaluate(sure_of_the_same_again(0.3), texts(30), tier=SMALL).bits_per_byte
    assert found.low == found.value == found.high


def test_tiers_take_the_first_of_each() -> None:
    tier = Tier(context=16, stride=8, rows=3, texts=2, tokens_per_text=10, probes_per_distance=1)
    tokens = torch.tensor([5, 5, 5, 5])
    probes = [Probe(tokens, (2, 3), d) for d in (4, 4, 8)]
    found = evaluate(uniform, texts(30, 8, 40), probes=probes, tier=tier)
    assert [(c.name, c.tokens) for c in found.texts] == [("text 0", 9), ("text 1", 7)]
    assert {d: len(h) for d, h in found.hits.items()} == {4: 1, 8: 1}
    assert (QUICK.context, FULL.texts) == (1024, None)


def _bad(change: Callable[[], Any], message: str) -> Any:
    return pytest.param(change, message, id=message[:40])


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        _bad(lambda: evaluate(uniform, [], tier=SMALL), "there are no texts"),
        _bad(lambda: evaluate(uniform, texts(5, 1), tier=SMALL), "'text 1' has 1 tokens: two are the least"),
        _bad(lambda: evaluate(uniform, [Text("t", torch.ones(3))], tier=SMALL), "expected int64"),
        _bad(
            lambda: evaluate(uniform, [Text("t", torch.ones(1, 3, dtype=torch.int64))], tier=SMALL),
            r"got torch.int64 \[1, 3\]",
        ),
        _bad(
            lambda: evaluate(uniform, [Text("t", torch.tensor([1, 2]), torch.tensor([1]))], tier=SMALL),
            "one entry for each token",
        ),
        _bad(
            lambda: evaluate(uniform, [Text("t", torch.tensor([1, 2]), torch.tensor([1, 0]))], tier=SMALL),
            "stand for no bytes",
        ),
        _bad(lambda: evaluate(uniform, texts(5) * 2, tier=SMALL), "two texts have the same name"),
        _bad(lambda: evaluate(torch.nn.Identity(), texts(5), tier=SMALL), "model is in training mode"),
        _bad(
            lambda: evaluate(uniform, texts(5), reference=torch.nn.Identity(), tier=SMALL),
            "reference is in training mode",
        ),
        _bad(lambda: evaluate(lambda t: t, texts(5), tier=SMALL), r"model gave \[3, 16\]"),
        _bad(lambda: evaluate(lambda t: "no", texts(5), tier=SMALL), "model gave str"),
        _bad(
            lambda: evaluate(lambda t: uniform(t) * math.nan, texts(5), tier=SMALL),
            "model gave logits that are NaN",
        ),
        _bad(
            lambda: evaluate(uniform, texts(5), reference=lambda t: uniform(t) / 0, tier=SMALL),
            "reference gave logits that are NaN",
        ),
        _bad(
            lambda: evaluate(
                uniform, texts(5), probes=[Probe(torch.ones(4, dtype=torch.int64), (3, 5), 2)], tier=SMALL
            ),
            "a probe of 4 tokens has no answer at 3 to 5",
        ),
        _bad(lambda: Tier(context=8, stride=9), "stride 9: expected 1 to the context, 8"),
        _bad(lambda: Tier(rows=0), "rows is 0"),
    ],
)
def test_bad_input_is_an_error(attempt: Callable[[], Any], message: str) -> None:
    with pytest.raises(QualityError, match=message):
        attempt()


def test_a_probability_of_zero_names_the_text() -> None:
    def certain(tokens: Tensor) -> Tensor:
        return torch.where(F.one_hot(tokens, VOCABULARY).bool(), 0.0, -math.inf)

    with pytest.raises(QualityError, match="bits per byte of text 'text 0' is inf"):
        evaluate(certain, texts(30), tier=SMALL)
    allowed = [Text("same", torch.ones(30, dtype=torch.int64))]
    with pytest.raises(QualityError, match="KL divergence of text 'same' is inf"):
        evaluate(certain, allowed, reference=uniform, tier=SMALL)


def test_probes_of_two_lengths_are_an_error() -> None:
    probes = [Probe(torch.ones(n, dtype=torch.int64), (2, 3), 2) for n in (4, 5)]
    with pytest.raises(QualityError, match="pad them at the end"):
        evaluate(uniform, texts(5), probes=probes, tier=SMALL)


def test_measurements_of_other_texts_do_not_compare() -> None:
    one, other = (evaluate(uniform, texts(size), tier=SMALL) for size in (5, 6))
    with pytest.raises(QualityError, match="evaluate both alike"):
        one.difference(other)
    assert isinstance(one, Quality)
