"""The search alone, over measures that are plain functions, against what trying everything finds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effopt.tuning.budget import Budget
from effopt.tuning.search import Choice, Infeasible, search

BUDGET = Budget.parse("kl<=1")


@dataclass(frozen=True)
class World:
    """Choices whose harms add up, and pairs of sites that do more harm together."""

    choices: tuple[Choice, ...]
    harms: Mapping[Choice, float]
    pairs: Mapping[tuple[int, int], float]

    def kl(self, taken: Sequence[Choice]) -> float:
        sites = {choice.site for choice in taken}
        return sum(self.harms[c] for c in taken) + sum(
            extra for pair, extra in self.pairs.items() if set(pair) <= sites
        )

    def measure(self, taken: Sequence[Choice]) -> dict[str, float]:
        assert len({choice.site for choice in taken}) == len(taken), "two choices of one site"
        return {"kl": self.kl(taken)}

    def sets(self) -> list[tuple[Choice, ...]]:
        by_site: dict[object, list[Choice | None]] = {}
        for choice in self.choices:
            by_site.setdefault(choice.site, [None]).append(choice)
        return [tuple(c for c in one if c) for one in itertools.product(*by_site.values())]


harms = st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.4, 0.7, 1.0, 3.0, math.nan, math.inf])


@st.composite
def worlds(draw: Callable[..., object], *, grows: bool = False, interacts: bool = True) -> World:
    """`grows`: at a site, what saves more does more harm."""
    choices: list[Choice] = []
    cost: dict[Choice, float] = {}
    count = draw(st.integers(1, 4))
    for site in range(count):
        drawn = draw(st.lists(harms, min_size=1, max_size=3))
        drawn = sorted(h for h in drawn if math.isfinite(h)) if grows else drawn
        for number, harm in enumerate(drawn):
            saving = number + draw(st.integers(1, 9)) / 10
            choices.append(Choice(site, f"way {number}", saving))
            cost[choices[-1]] = harm
    pairs = draw(
        st.dictionaries(
            st.sampled_from(list(itertools.combinations(range(4), 2))),
            st.sampled_from([0.05, 0.5] if grows else [-0.3, 0.05, 0.5]),
            max_size=3 if interacts else 0,
        )
    )
    return World(tuple(choices), cost, pairs)


@given(worlds(), st.lists(harms, min_size=12, max_size=12))
def test_what_is_returned_keeps_the_budget_on_both_splits(seen: World, unseen: list[float]) -> None:
    """The splits need have nothing to do with each other."""
    other = World(seen.choices, dict(zip(seen.choices, unseen, strict=False)), {})
    found = search(seen.choices, BUDGET, seen.measure, other.measure)
    assert seen.kl(found.accepted) <= 1
    assert other.kl(found.accepted) <= 1
    assert len({c.site for c in found.accepted}) == len(found.accepted)
    assert [v.choice for v in found.verdicts] == list(seen.choices)
    for verdict in found.verdicts:
        assert verdict.is_accepted == (verdict.choice in found.accepted)
        assert verdict.is_accepted != bool(verdict.reason)


@given(worlds(grows=True))
def test_nothing_that_was_left_can_be_added(world: World) -> None:
    found = search(world.choices, BUDGET, world.measure, world.measure)
    for left in world.choices:
        others = [c for c in found.accepted if c.site != left.site]
        now = next((c.saving for c in found.accepted if c.site == left.site), 0.0)
        if left.saving > now:
            assert world.kl([*others, left]) > 1


@given(worlds(grows=True, interacts=False))
def test_against_trying_everything(world: World) -> None:
    """Greedy: the best of all sets is not promised, but it is never beaten by more than one step is worth."""
    found = search(world.choices, BUDGET, world.measure, world.measure)
    best = max(sum(c.saving for c in taken) for taken in world.sets() if world.kl(taken) <= 1)
    got = sum(c.saving for c in found.accepted)
    assert got <= best + 1e-9
    assert got >= best - max((c.saving for c in world.choices), default=0.0) - 1e-9


@given(worlds())
def test_the_same_twice(world: World) -> None:
    one, other = (search(world.choices, BUDGET, world.measure, world.measure) for _ in range(2))
    assert one.accepted == other.accepted
    assert str(one.verdicts) == str(other.verdicts)


@given(worlds(grows=True))
def test_an_impossible_budget_accepts_nothing_and_says_so(world: World) -> None:
    def measure(taken: Sequence[Choice]) -> dict[str, float]:
        return {"bits_per_byte": 2.0 - world.kl(taken)}  # compression would even help

    found = search(world.choices, Budget.parse("bits_per_byte<=1.5"), measure, measure)
    assert found.accepted == ()
    assert found.impossible == "bits_per_byte is 2 (calibration; bits_per_byte<=1.5)"
    assert found.measurements == 2
    assert not any(v.is_accepted for v in found.verdicts)


def of(*savings_and_harms: tuple[object, float, float]) -> tuple[list[Choice], dict[Choice, float]]:
    made = {Choice(site, f"saves {saving}", saving): harm for site, saving, harm in savings_and_harms}
    return list(made), made


def run(choices: list[Choice], harms: dict[Choice, float], unseen: dict[Choice, float] | None = None) -> dict:
    other = harms if unseen is None else unseen
    found = search(
        choices,
        BUDGET,
        lambda taken: {"kl": sum(harms[c] for c in taken)},
        lambda taken: {"kl": sum(other[c] for c in taken)},
    )
    return {(v.choice.site, v.choice.saving): v.reason for v in found.verdicts}


def test_a_site_is_upgraded_when_there_is_room() -> None:
    assert run(*of(("a", 1, 0.1), ("a", 3, 0.5), ("b", 1, 0.1))) == {
        ("a", 1): "saves 3 was accepted here, and saves as much",
        ("a", 3): "",
        ("b", 1): "",
    }


def test_a_site_keeps_the_weaker_choice_when_the_stronger_does_not_fit() -> None:
    reasons = run(*of(("a", 1, 0.1), ("a", 3, 0.8), ("b", 5, 0.5)))
    assert reasons[("a", 1)] == reasons[("b", 5)] == ""
    assert reasons[("a", 3)] == "with what was accepted before it, kl is 1.3 (calibration; kl<=1)"


def test_a_choice_that_no_mixture_favours_is_taken_where_the_stronger_does_not_fit() -> None:
    """Halfway up in harm and less than halfway in saving: greedy alone never looks at it."""
    reasons = run(*of(("a", 1, 0.0), ("a", 1.5, 0.4), ("a", 4, 0.9), ("b", 5, 0.5)))
    assert reasons[("a", 1.5)] == reasons[("b", 5)] == ""


def test_what_breaks_the_budget_alone_is_not_tried_again() -> None:
    reasons = run(*of(("a", 9, 1.5), ("b", 1, 0.5)))
    assert reasons == {("a", 9): "alone, kl is 1.5 (calibration; kl<=1)", ("b", 1): ""}


def test_later_choices_are_tried_after_one_was_reverted() -> None:
    reasons = run(*of(*((site, 10 - site / 10, 0.3) for site in range(5)), (9, 0.01, 0.1)))
    assert [site for (site, _), reason in reasons.items() if not reason] == [0, 1, 2, 9]


def test_validation_reverts_what_breaks_it_and_falls_back_to_the_weaker_choice() -> None:
    choices, harms = of(("a", 1, 0.1), ("a", 3, 0.5), ("b", 1, 0.1))
    unseen = dict(zip(choices, (0.2, 2.0, 0.3), strict=True))
    reasons = run(choices, harms, unseen)
    assert reasons[("a", 1)] == reasons[("b", 1)] == ""
    assert "validation" in reasons[("a", 3)]


def test_the_room_of_what_validation_reverts_is_had_by_others() -> None:
    choices, harms = of(("a", 9, 0.9), ("b", 1, 0.3), ("c", 1, 0.9))
    unseen = dict(zip(choices, (1.5, 0.3, 0.2), strict=True))
    reasons = run(choices, harms, unseen)
    assert reasons[("b", 1)] == ""
    assert "validation" in reasons[("a", 9)]
    assert "calibration" in reasons[("c", 1)]


def test_what_is_not_finite_or_cannot_be_run_is_reverted_with_the_reason() -> None:
    choices, _ = of(("a", 1, 0), ("b", 1, 0), ("c", 1, 0))

    def measure(taken: Sequence[Choice]) -> dict[str, float]:
        if choices[0] in taken:
            raise Infeasible("a cannot be carried out")
        return {"kl": math.nan if choices[1] in taken else 0.1}

    found = search(choices, BUDGET, measure, measure)
    assert [v.reason for v in found.verdicts] == [
        "alone, a cannot be carried out", "alone, kl is nan (calibration; kl<=1)", ""
    ]  # fmt: skip
    assert found.verdicts[0].alone is None


def test_a_hundred_sites_take_few_measurements() -> None:
    """All fit: each alone, once; then all of them together, on either split."""
    choices, harms = of(*((site, 1, 0.001) for site in range(100)))
    found = search(choices, BUDGET, *[lambda taken: {"kl": sum(harms[c] for c in taken)}] * 2)
    assert len(found.accepted) == 100
    assert found.measurements == 2 + 100 + 1 + 1


def test_a_budget_of_two_limits_is_kept_in_both() -> None:
    choices, _ = of(("a", 3, 0), ("b", 2, 0), ("c", 1, 0))

    def measure(taken: Sequence[Choice]) -> dict[str, float]:
        names = {c.site for c in taken}
        return {"kl": 0.9 * ("a" in names) + 0.2 * ("b" in names), "agreement": 1.0 - 0.05 * ("c" in names)}

    found = search(choices, Budget.parse("kl<=1,agreement>=0.98"), measure, measure)
    reasons = {v.choice.site: v.reason for v in found.verdicts}
    assert "agreement is 0.95" in reasons["c"]
    assert sorted(c.site for c in found.accepted) in (["a"], ["b"])


@pytest.mark.parametrize("fits", range(12))
def test_the_longest_prefix_is_found_wherever_it_ends(fits: int) -> None:
    choices, _ = of(*((site, 20 - site, 0.05) for site in range(12)))

    def measure(taken: Sequence[Choice]) -> dict[str, float]:
        return {"kl": 2.0 if any(c.site >= fits for c in taken) and len(taken) > 1 else 0.05 * len(taken)}

    found = search(choices, BUDGET, measure, measure)
    assert {c.site for c in found.accepted} == (set(range(fits)) or {0})
