"""The built-in plugins that watch one compile call. They hold its options and its report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from effopt.plugins.dump import Dump
from effopt.plugins.fuel import Fuel
from effopt.plugins.manager import Registry
from effopt.plugins.report import GraphReport
from effopt.plugins.standard import RunPass
from effopt.plugins.timing import Timing
from effopt.plugins.verify import Verify


def observers(
    registry: Registry,
    report: GraphReport,
    *,
    verify: str,
    rtol: float | None,
    fuel: int | None,
    dump: str | None,
    runs_backend: bool,
) -> Iterator[tuple[str, Any]]:
    """(name, plugin object) of each observer that these options ask for; see `effopt.options.Options`."""
    yield "effopt-run-pass", RunPass(registry.origin_of, always_check=verify == "always")
    yield "effopt-verify", Verify(verify, rtol, runs_backend, report)
    if fuel is not None:
        yield "effopt-fuel", Fuel(fuel, report)
    if dump is not None:
        yield "effopt-dump", Dump(dump)
    yield "effopt-timing", Timing(report)
