"""`effopt.tune`: from a budget of quality to a plan that keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from effopt import pipeline as pipelines
from effopt.errors import OptionError, PlanError, QualityError, unknown
from effopt.graph.rewrite import PassResult, Rejected
from effopt.passes.base import PlannedPass
from effopt.passes.plan import Plan
from effopt.plugins.manager import Registry, build_registry
from effopt.quality.texts import Tier
from effopt.tuning.batches import TEXTS, split
from effopt.tuning.budget import Budget
from effopt.tuning.measure import OBJECTIVES, Candidate, Cost, Split, Subject, plan_of
from effopt.tuning.report import LeftPlace, TriedChoice, TuningReport, told
from effopt.tuning.search import Choice, Found, Infeasible, Verdict, search

Tell = Callable[[str], None]


def tune(
    model: Callable[..., Any],
    batches: Iterable[Any],
    budget: str,
    passes: Any = None,
    *,
    objective: str = "seconds",
    tier: Tier = TEXTS,
    plugins: Sequence[Any] = (),
    progress: Tell = lambda _: None,
) -> Plan:
    """Decide, place by place, which lossy passes a language model takes within a budget of quality.

    Two thirds of the batches are decided on, one third the result is held against. Every candidate is run on
    them, without gradients and without Inductor, so a few short batches go a long way.

    Args:
        model: gives logits `[rows, t, vocabulary]`, or an object that has them; in evaluation mode.
        batches: inputs of calls, as for `effopt.calibrate`, that hold token ids, int64 `[rows, t]`: two at
            least, or one of two rows. Or texts (`effopt.testing.quality.Text`).
        budget: `kl<=0.05`, `agreement>=0.98`, `bits_per_byte<=1.02x` (of the uncompressed model's), or
            several with commas, which then must all hold. Without texts a token counts as one byte.
        passes: text, names or instances; several of one pass are alternatives. By default, what each
            registered pass that can be planned offers.
        objective: what is to fall, as predicted of one call: `seconds`, `bytes` or `flops`.
        tier: how texts are read.
        plugins: plugin objects for this call only.
        progress: is told what is going on.

    Returns:
        The plan, with a `TuningReport` as `.report`. It keeps the budget on the validation split; where
        nothing does, it is empty and the report says why.

    Raises:
        OptionError: a malformed budget, an unknown metric, pass or objective, an exact pass.
        QualityError: batches that are too few, too short or no token ids; figures that are not finite.
        PlanError: nothing in the model that the passes could change.
    """
    limits = Budget.parse(budget)
    if objective not in OBJECTIVES:
        raise unknown("objective", str(objective), OBJECTIVES)
    registry = build_registry(tuple(plugins))
    alternatives = _alternatives(passes, registry)
    model = getattr(model, "_orig_mod", model)  # of torch.compile(model)
    if getattr(model, "training", False):
        raise QualityError("the model is in training mode, where dropout makes chance of it: call .eval()")
    device = (
        next(model.parameters()).device if isinstance(model, nn.Module) and [*model.parameters()] else None
    )
    seen, unseen = (Split(model, part) for part in split(batches, tier, device))
    bases = [given[0] if len(given) == 1 else type(given[0]).build({}) for given in alternatives.values()]
    tuning = _Tuning(Subject(model, bases, registry), seen, unseen, limits, objective, progress)
    try:
        return tuning.run(alternatives)
    finally:
        tuning.subject.graphs.graphs.clear()  # Dynamo keeps what it compiled, and with it these


def _alternatives(passes: Any, registry: Registry) -> dict[str, list[PlannedPass]]:
    """Pass name -> the instances between which is chosen at each place."""
    if passes is None or (isinstance(passes, (str, list, tuple)) and not passes):
        planned = (p for p in registry.passes.values() if issubclass(p, PlannedPass))
        passes = [spec for p in planned for spec in p.alternatives]
    found: dict[str, list[PlannedPass]] = {}
    for given in pipelines.resolve(passes, registry):
        if given.exact:
            raise OptionError(f"{given.name} is exact: it costs no quality, so there is nothing to tune")
        if not isinstance(given, PlannedPass):
            raise OptionError(f"{given.name} decides nothing place by place, so there is nothing to tune")
        if given not in found.setdefault(given.name, []):
            found[given.name].append(given)
    return found


class _Tuning:
    """One call of `tune`."""

    def __init__(
        self, subject: Subject, seen: Split, unseen: Split, budget: Budget, objective: str, tell: Tell
    ) -> None:
        self.subject, self.seen, self.unseen = subject, seen, unseen
        self.budget, self.objective, self.tell = budget, objective, tell
        self.alone: dict[Choice, Mapping[str, float] | Infeasible] = {}
        """Figures on the calibration split."""
        self.useless: list[TriedChoice] = []
        """Choices that are out before the search."""
        self.left: list[Rejected] = []
        """What passes refused."""

    def run(self, alternatives: Mapping[str, Sequence[PlannedPass]]) -> Plan:
        self.tell("capturing the model")
        base = self.subject.candidate(())
        uncompressed = {"calibration": self.seen.figures(base), "validation": self.unseen.figures(base)}
        bad = [f for figures in uncompressed.values() for f in figures.items() if not math.isfinite(f[1])]
        if bad:
            raise QualityError(f"{bad[0][0]} of the uncompressed model is {bad[0][1]}")
        # Made again: what was run is in its last form.
        base = self.subject.candidate(())
        is_possible = not any(self.budget.broken(figures, figures) for figures in uncompressed.values())
        offers = self._offers(alternatives)
        choices = []
        for number, (name, path, decision) in enumerate(offers, start=1):
            self.tell(f"measuring each choice alone, {number} of {len(offers)}")
            choices += self._alone((name, path), decision, base.cost(), is_possible)
        found = search(
            choices,
            self.budget,
            self._calibrate,
            lambda taken: self.unseen.figures(self.subject.candidate(taken)),
            self.tell,
        )
        scores: dict[str, dict[str, float]] = {}
        for verdict in found.verdicts:
            if verdict.is_accepted:
                name, path = verdict.choice.site
                scores.setdefault(name, {})[path] = verdict.share
        plan = plan_of(base, self.subject.candidate(found.accepted, scores))
        return self._checked(plan, found, base, uncompressed)

    def _calibrate(self, taken: Sequence[Choice]) -> Mapping[str, float]:
        known = self.alone.get(taken[0]) if len(taken) == 1 else None
        if isinstance(known, Infeasible):
            raise known
        return known or self.seen.figures(self.subject.candidate(taken))

    def _offers(self, alternatives: Mapping[str, Sequence[PlannedPass]]) -> list[tuple[str, str, Any]]:
        """(pass name, path, decision) of all that may be done, in the order of the passes."""
        offers: dict[tuple[str, str, str], tuple[str, str, Any]] = {}
        for index in range(len(self.subject.graphs.graphs)):
            form = self.subject.begin(index).begin(self.subject.candidate(()).plans)
            for pass_ in self.subject.rest:
                for given in alternatives.get(pass_.name, ()):
                    for path, decision in self._offered(given, form.captured.module, form.context):
                        key = pass_.name, path, json.dumps(decision, sort_keys=True)
                        offers.setdefault(key, (pass_.name, path, decision))
                pass_.apply(form.captured.module, form.context)
        if not offers:
            why = f": {self.left[0].reason}" if self.left else ""
            raise PlanError(f"{', '.join(alternatives)} can change nothing in this model{why}")
        return sorted(offers.values(), key=lambda offer: list(alternatives).index(offer[0]))

    def _offered(self, given: PlannedPass, module: Any, context: Any) -> list[tuple[str, Any]]:
        result = PassResult()
        try:
            offered = given.choices(module, context, result)
        except NotImplementedError as why:
            raise OptionError(str(why)) from why
        self.left += result.rejected
        return [(path, decision) for path, decisions in offered.items() for decision in decisions]

    def _alone(self, site: tuple[str, str], decision: Any, before: Cost, is_measured: bool) -> list[Choice]:
        """The choice, measured alone; none if it saves nothing or cannot be carried out."""
        candidate = self.subject.candidate([Choice(site, "", 1.0, decision)])
        total, why = before.of(self.objective), f"it saves no {self.objective}"
        saving = 0.0
        try:
            saving = total - candidate.cost().of(self.objective)
        except PlanError as error:
            why = str(error)
        if not saving > 0:
            tried = TriedChoice(*site, decision, False, saving / total, math.nan, None, why)
            self.useless.append(tried)
            return []
        choice = Choice(site, told(decision), saving, decision)
        if is_measured:
            try:
                self.alone[choice] = self.seen.figures(candidate)
            except Infeasible as error:
                self.alone[choice] = error
        return [choice]

    def _checked(
        self, plan: Plan, found: Found, base: Candidate, uncompressed: Mapping[str, Mapping[str, float]]
    ) -> Plan:
        """The plan as it is carried out in a compile call: its figures, and the report."""
        compressed, after, broken = uncompressed, base.cost(), ""
        if plan.sections:
            planned = self.subject.planned(plan)
            try:
                figures = {
                    "calibration": self.seen.figures(planned),
                    "validation": self.unseen.figures(planned),
                }
                limits = [b for n, f in figures.items() for b in self.budget.broken(f, uncompressed[n])]
                broken = f"the plan does not keep {limits[0]} when it is carried out" if limits else ""
            except Infeasible as error:
                broken = str(error)
            if broken:
                plan = Plan(())
            else:
                compressed, after = figures, planned.cost()
        changed = {(s.name, e.path) for s in plan.sections for e in s.entries if e.decision is not None}
        total = base.cost().of(self.objective)
        tried = [self._tried(verdict, changed, total, broken) for verdict in found.verdicts]
        left = dict.fromkeys(LeftPlace(r.pass_name, r.layer or r.node, r.reason) for r in self.left)
        report = TuningReport(
            str(self.budget),
            self.objective,
            uncompressed,
            compressed,
            base.cost(),
            after,
            (*tried, *self.useless),
            tuple(left),
            found.impossible,
            self.seen.runs + self.unseen.runs,
        )
        return replace(plan, report=report)

    def _tried(
        self, verdict: Verdict, changed: set[tuple[str, str]], total: float, broken: str
    ) -> TriedChoice:
        choice, reason = verdict.choice, verdict.reason
        name, path = choice.site
        if verdict.is_accepted and (name, path) not in changed:
            reason = broken or "what else was accepted leaves nothing of it to change"
        is_accepted = verdict.is_accepted and not reason
        figures = choice.decision, is_accepted, choice.saving / total, verdict.share, verdict.alone
        return TriedChoice(name, path, *figures, reason)
