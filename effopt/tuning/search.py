"""The search: which choices to take, given what each saves and a way to measure any set of them.

A multiple-choice knapsack whose costs can only be measured: at most one choice a site, the most saving, and
the budget kept. First each choice is measured alone. Then choices are taken greedily, by what they save more
for each share of the budget that they use up more; a site may be upgraded to a stronger choice later. How
many of them fit together is measured, by bisection, and each one that does not fit is reverted before later
ones are tried. Then the same on the validation split, of which nothing was known before; where it reverts
something, what had not fitted beside that is tried again, on both.

What is returned was measured and keeps the budget on both splits. It is a local optimum where harm grows with
each step: no choice that was reverted on the calibration split can be added to what was then accepted.
Source: Sinha and Zoltners 1979, The Multiple-Choice Knapsack Problem (greedy over undominated choices).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effopt.tuning.budget import Budget

Metrics = Mapping[str, float]


class Infeasible(Exception):  # noqa: N818 - a value that travels by `raise`, not an error
    """Why choices cannot be carried out together, or measured."""


@dataclass(frozen=True)
class Choice:
    """One thing that may be done at one site."""

    site: Any
    """Equal for the choices between which is chosen; hashable."""
    name: str
    """Different for the choices of a site; for people."""
    saving: float
    """Above 0."""
    decision: Any = field(default=None, compare=False, repr=False)


Measure = Callable[[Sequence[Choice]], Metrics]
"""Figures of the model with these choices, at most one a site. May raise Infeasible."""


@dataclass(frozen=True)
class Verdict:
    """What became of a choice."""

    choice: Choice
    is_accepted: bool
    alone: Metrics | None
    """Figures of the model with this choice alone, on the calibration split; None if it could not be run."""
    share: float
    """Of the budget, that it uses up alone."""
    reason: str


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    accepted: tuple[Choice, ...]
    verdicts: tuple[Verdict, ...]
    """Of every choice, in the order given."""
    impossible: str
    """Why nothing can be accepted: the uncompressed model breaks the budget. Empty otherwise."""
    measurements: int


def search(
    choices: Sequence[Choice],
    budget: Budget,
    calibrate: Measure,
    validate: Measure,
    tell: Callable[[str], None] = lambda _: None,
) -> Found:
    """Choose. Deterministic if the measures are.

    Args:
        choices: all that may be done.
        budget: what must hold.
        calibrate: measures on the split that decisions are made from.
        validate: measures on the split that they are held against.
        tell: is told what is going on.
    """
    splits = _Split("calibration", calibrate, budget), _Split("validation", validate, budget)
    for split in splits:
        if broken := split.broken(()):
            verdicts = tuple(Verdict(c, False, None, math.nan, "nothing fits the budget") for c in choices)
            return Found((), verdicts, broken, sum(s.count for s in splits))
    return _Search(choices, *splits, tell).run()


class _Split:
    """One way to measure, with its memory."""

    def __init__(self, name: str, measure: Measure, budget: Budget) -> None:
        self.name, self.measure, self.budget = name, measure, budget
        self.known: dict[frozenset[Choice], Metrics | str] = {}
        self.count = 0
        self.uncompressed: Metrics = {}
        self.uncompressed = self._figures(())  # type: ignore[assignment] # raises if it cannot be run

    def _figures(self, taken: Sequence[Choice]) -> Metrics | str:
        key = frozenset(taken)
        if key not in self.known:
            self.count += 1
            try:
                self.known[key] = self.measure(taken)
            except Infeasible as why:
                if not taken:
                    raise
                self.known[key] = str(why)
        return self.known[key]

    def metrics(self, taken: Sequence[Choice]) -> Metrics | None:
        found = self._figures(taken)
        return None if isinstance(found, str) else found

    def share(self, taken: Sequence[Choice]) -> float:
        """Of the budget, that these use up; infinite if they cannot be run."""
        found = self.metrics(taken)
        return math.inf if found is None else self.budget.share(found, self.uncompressed)

    def broken(self, taken: Sequence[Choice]) -> str:
        """Why these do not keep the budget; empty if they do."""
        found = self._figures(taken)
        if isinstance(found, str):
            return found
        broken = self.budget.broken(found, self.uncompressed)
        return ", ".join(f"{b.metric} is {found[b.metric]:.4g} ({self.name}; {b})" for b in broken)


class _Search:
    def __init__(
        self, choices: Sequence[Choice], seen: _Split, unseen: _Split, tell: Callable[[str], None]
    ) -> None:
        self.choices, self.seen, self.unseen, self.tell = choices, seen, unseen, tell
        self.shares: dict[Choice, float] = {}
        self.reasons: dict[Choice, str] = {}

    def run(self) -> Found:
        for number, choice in enumerate(self.choices, start=1):
            self.tell(f"measuring each choice alone, {number} of {len(self.choices)}")
            self.shares[choice] = self.seen.share((choice,))
            if broken := self.seen.broken((choice,)):
                self.reasons[choice] = f"alone, {broken}"
        alone = set(self.reasons)
        steps = self._grow(self._greedy, self.seen.broken, self._expected_to_fit())
        did_not_fit = set(self.reasons) - alone
        accepted = self._grow(
            lambda taken: [s for s in steps[_after(steps, taken) :] if s not in self.reasons],
            self._broken_anywhere,
            len(steps),
        )
        if len(accepted) < len(steps):  # others may have the room of what was reverted
            self.reasons = {choice: why for choice, why in self.reasons.items() if choice not in did_not_fit}
            accepted = self._grow(self._greedy, self._broken_anywhere, 1, accepted)
        taken = together(accepted)
        verdicts = tuple(self._verdict(choice, taken) for choice in self.choices)
        return Found(tuple(taken), verdicts, "", self.seen.count + self.unseen.count)

    def _broken_anywhere(self, taken: Sequence[Choice]) -> str:
        return self.unseen.broken(taken) or self.seen.broken(taken)

    def _grow(
        self,
        order: Callable[[Sequence[Choice]], Sequence[Choice]],
        broken: Callable[[Sequence[Choice]], str],
        guess: int,
        start: Sequence[Choice] = (),
    ) -> list[Choice]:
        """Steps in the order in which they are taken, each as long as nothing is broken.

        Args:
            order: steps taken so far -> those to try next, the most promising first.
            broken: why the choices that the steps lead to do not hold, or an empty string.
            guess: how many of the first order may hold.
            start: steps that were taken already.
        """
        taken = list(start)
        while steps := order(taken):
            good, bad, length = 0, len(steps) + 1, max(1, min(guess, len(steps)))
            while bad - good > 1:
                self.tell(f"measuring choices together, {len(taken) + length} of {len(self.choices)}")
                is_broken = bool(broken(together([*taken, *steps[:length]])))
                good, bad = (good, length) if is_broken else (length, bad)
                length = min(2 * good, bad - 1) if bad > len(steps) else (good + bad) // 2
                length = max(length, good + 1)
            taken += steps[:good]
            if bad <= len(steps):
                why = broken(together([*taken, steps[good]]))
                self.reasons[steps[good]] = f"with what was accepted before it, {why}"
            guess = 1
        return taken

    def _expected_to_fit(self) -> int:
        """How many steps fit if harm adds up."""
        used, now = 0.0, dict[Hashable, float]()
        for count, step in enumerate(self._greedy([])):
            used += self.shares[step] - now.get(step.site, 0.0)
            now[step.site] = self.shares[step]
            if used > 1:
                return count
        return len(self.choices)

    def _greedy(self, taken: Sequence[Choice]) -> list[Choice]:
        """The steps that are left, by saving for share of the budget, as if harm added up."""
        current = {choice.site: choice for choice in together(taken)}
        sites: dict[Hashable, list[Choice]] = {}
        for choice in self.choices:
            if choice not in self.reasons:
                sites.setdefault(choice.site, []).append(choice)
        steps: list[tuple[float, int, Choice]] = []
        for site, members in sites.items():
            for worth, choice in self._upgrades(current.get(site), members):
                steps.append((-worth, len(steps), choice))
        return [choice for _, _, choice in sorted(steps)]

    def _upgrades(self, current: Choice | None, members: Sequence[Choice]) -> Iterator[tuple[float, Choice]]:
        """(worth, choice) of the successive upgrades of one site, whose worth falls from step to step."""
        saving = current.saving if current is not None else 0.0
        share = self.shares[current] if current is not None else 0.0
        last = math.inf
        while better := [c for c in members if c.saving > saving]:
            rated = [(_worth(c.saving - saving, self.shares[c] - share), c.saving, c) for c in better]
            worth, _, choice = max(rated, key=lambda r: r[:2])
            last = min(last, worth)
            yield last, choice
            saving, share = choice.saving, self.shares[choice]

    def _verdict(self, choice: Choice, taken: Sequence[Choice]) -> Verdict:
        is_accepted = choice in taken
        reason = "" if is_accepted else self.reasons.get(choice, "")
        if not is_accepted and not reason:
            stronger = next((c for c in taken if c.site == choice.site), None)
            reason = (
                f"{stronger.name} was accepted here, and saves as much" if stronger else "it was not reached"
            )
        return Verdict(choice, is_accepted, self.seen.metrics((choice,)), self.shares[choice], reason)


def together(steps: Sequence[Choice]) -> list[Choice]:
    """The choices that steps lead to: the last one of each site, sites in the order of their first step."""
    return list({step.site: step for step in steps}.values())


def _worth(saving: float, share: float) -> float:
    return math.inf if share <= 0 else saving / share


def _after(steps: Sequence[Choice], taken: Sequence[Choice]) -> int:
    """Where to go on in `steps`, of which `taken` were taken in order."""
    return steps.index(taken[-1]) + 1 if taken else 0
