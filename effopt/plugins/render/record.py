"""A report as plain data, for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from effopt.plugins.report import Report

FORMAT = "effopt-report/1"
"""Names the layout. Fields may be added under one number; a changed meaning takes the next."""


def as_data(report: Report) -> dict[str, Any]:
    """Everything in the report, with totals and versions; JSON types only."""
    return {
        "format": FORMAT,
        "versions": {"effopt": effopt_version(), "torch": torch.__version__},
        "counts": dict(report.counts),
        "ops": dict(report.ops),
        "faults": list(report.faults),
        "graphs": [_plain(graph) for graph in report.graphs],
    }


def effopt_version() -> str:
    """The installed version; `unknown` where the package is used from a checkout that is not installed."""
    try:
        return version("effopt")
    except PackageNotFoundError:
        return "unknown"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
