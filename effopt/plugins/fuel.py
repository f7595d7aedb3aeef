"""Fuel: allow the first N rewrites and no more.

Rewrites are counted, not passes, in the order in which they are made, so that a wrong one is found by
halving N (`effopt bisect`).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from effopt.graph.rewrite import Match, Replacement
from effopt.passes.base import Pass
from effopt.plugins.hookspec import hookimpl

if TYPE_CHECKING:
    from effopt.plugins.report import GraphReport


class Fuel:
    """The plugin, one object for each compile call: each graph has its own fuel."""

    def __init__(self, fuel: int, report: GraphReport) -> None:
        self.fuel, self.report = fuel, report
        self._granted = 0

    @hookimpl(wrapper=True)
    def effopt_approve_rewrite(
        self, pass_: Pass, match: Match, replacement: Replacement
    ) -> Generator[None, str | None, str | None]:
        """Refuse when the fuel is used up; a rewrite that something else refuses costs none."""
        reason = yield
        if reason is not None:
            return reason
        if self._granted >= self.fuel:
            self.report.checks["out of fuel"] += 1
            return f"out of fuel: {self.fuel} rewrites were allowed"
        self._granted += 1
        self.report.checks["fuel used"] += 1
        return None
