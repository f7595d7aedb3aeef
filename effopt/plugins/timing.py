"""Seconds of each pass, without those of the checks that it waited for."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from effopt.passes.base import Pass
from effopt.plugins.hookspec import hookimpl

if TYPE_CHECKING:
    from effopt.plugins.report import GraphReport


class Timing:
    """The plugin, one object for each compile call."""

    def __init__(self, report: GraphReport) -> None:
        self.report = report

    @hookimpl(wrapper=True, tryfirst=True)
    def effopt_run_pass(self, pass_: Pass) -> Generator[None, Any, Any]:
        """Add the time of this run to `seconds["pass:<name>"]`."""
        seconds, name = self.report.seconds, f"pass:{pass_.name}"
        start, checked = time.perf_counter(), seconds.get("check", 0.0)
        try:
            return (yield)
        finally:
            spent = time.perf_counter() - start - (seconds.get("check", 0.0) - checked)
            seconds[name] = seconds.get(name, 0.0) + spent
