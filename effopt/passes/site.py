"""Passes that decide site by site: linear layers, embeddings, or whatever they find and name."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from effopt.errors import PlanError
from effopt.graph.rewrite import PassResult, Reject, require
from effopt.passes.base import Context, PlannedPass
from effopt.passes.plan import Entry, PlannedSites, Section


@dataclass(frozen=True)
class Site:
    """A place where a pass may act."""

    node: Node
    path: str
    """Names it in every graph of the model, such as `model.layers.3.mlp.up_proj`. Several nodes of one path
    are one site: they are decided alike."""
    kind: str
    """What it is, such as `linear [704, 256]`: a plan holds for sites of the same path and kind."""


@dataclass(frozen=True)
class SitePass(PlannedPass):
    """A pass over sites: it decides, for each, and then does what was decided.

    Without a plan a site that it may not change is left, with the reason. With one, every site that the plan
    changes is changed so, or it is a PlanError: a graph left as it is would be of another model.
    """

    @abstractmethod
    def sites(self, module: GraphModule, context: Context, result: PassResult) -> Sequence[Site]:
        """The sites of a graph, in graph order, whatever the options say of them."""

    @abstractmethod
    def decide(self, site: Site, context: Context) -> Any:
        """What these options do to a site, as JSON. Raises `Reject`; without a reason if that is no news."""

    @abstractmethod
    def enact(
        self, site: Site, decision: Any, module: GraphModule, context: Context, result: PassResult
    ) -> None:
        """Do what was decided. Raises `Reject`, before any edit, if this graph does not allow it."""

    def choices(
        self, module: GraphModule, context: Context, result: PassResult
    ) -> Mapping[str, Sequence[Any]]:
        """What `decide` says of each site."""
        found: dict[str, tuple[Any, ...]] = {}
        for site in self.sites(module, context, result):
            decision: tuple[Any, ...] = ()
            try:
                decision = (self.decide(site, context),)
            except Reject as why:
                if why.reason:
                    result.reject(self.name, site.node, why.reason)
            found[site.path] = decision if found.get(site.path, decision) == decision else ()
        return found

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Decide and enact at every site. Raises PlanError, before any edit if the plan does not fit."""
        result = PassResult()
        plans = context.plans
        found = self.sites(module, context, result)
        section = plans.section(self.name)
        planned = _decisions(section, found) if section is not None else (plans.asked or {}).get(self.name)
        if section is not None or plans.asked is not None:
            planned = planned or {}
            scores = plans.scores.get(self.name, {})
            entries = {s.path: Entry(s.path, s.kind, planned.get(s.path), scores.get(s.path)) for s in found}
            plans.decided.append(Section(self.spec(), graphs=(PlannedSites(tuple(entries.values())),)))
        for site in found:
            try:
                if planned is None:
                    decision = self.decide(site, context)
                else:
                    decision = planned.get(site.path)
                    require(decision is not None, "the plan leaves it as it is", site.node)
                self.enact(site, decision, module, context, result)
            except Reject as why:
                if planned is not None and planned.get(site.path) is not None:
                    raise PlanError(
                        f"{self.spec()} cannot be carried out at {site.path!r} in this graph: {why}"
                    ) from why
                if why.reason:
                    result.reject(self.name, site.node, why.reason)
        return result


def _decisions(section: Section, found: Sequence[Site]) -> Mapping[str, Any]:
    """Path -> decision, for the sites of one graph. Raises PlanError with the first difference."""
    known: dict[str, Entry] = {}
    for (
        entry
    ) in section.entries:  # a site that is left in one graph, for it is dead there, may change in another
        if entry.path not in known or known[entry.path].decision is None:
            known[entry.path] = entry
    begin = f"the plan of {section.spec} does not fit this model"
    for site in found:
        if site.path not in known:
            near = difflib.get_close_matches(site.path, known, n=1, cutoff=0.0)
            has = f"the nearest that it has is {near[0]!r}" if near else "it names none"
            raise PlanError(f"{begin}: it names no {site.path!r} ({has})")
        if site.kind != known[site.path].kind:
            raise PlanError(f"{begin}: {site.path!r} is a {site.kind}, planned was {known[site.path].kind!r}")
    changed = {site.path for site in found if known[site.path].decision is not None}
    planned = [{e.path for e in graph.sites if e.decision is not None} for graph in section.graphs]
    if found and changed not in planned:
        nearest = max(planned, key=lambda paths: len(paths & changed))
        other = min(nearest - changed or changed - nearest)
        raise PlanError(
            f"{begin}: it changes {other!r} together with sites that this graph does not have. If the model"
            " has them, it was cut into graphs otherwise than when the plan was made; compile it whole"
        )
    return {path: entry.decision for path, entry in known.items()}
