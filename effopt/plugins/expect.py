"""Manifests: the canonical ops that a model must compile to, so that a lost fusion is noticed.

    {"format": "effopt-expect/1", "ops": {"attention": 2, "rms_norm": 5}}

Ops that the manifest does not name are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effopt.errors import OptionError, UnexpectedOps
from effopt.plugins.render.grouping import near_misses
from effopt.plugins.report import Report

FORMAT = "effopt-expect/1"
_MOST_REASONS = 12


def expect(report: Report, manifest: Mapping[str, Any] | str | Path) -> None:
    """Compare the ops of a report with a manifest.

    Args:
        report: of `explain` or `record`.
        manifest: `{"ops": {name: count}}`, or the path of such a JSON file.

    Raises:
        UnexpectedOps: lists each op whose count differs, and the near-misses that may be why.
        OptionError: the manifest cannot be read.
    """
    differing = differences(report, manifest)
    if differing:
        reasons = near_misses(report.rejected)[:_MOST_REASONS]
        told = [f"  {name}: {reason} ({place.count} times)" for name, reason, place in reasons]
        raise UnexpectedOps("\n".join([*differing, *(["left alone:", *told] if told else [])]))


def differences(report: Report, manifest: Mapping[str, Any] | str | Path) -> list[str]:
    """`attention: expected 4, got 3` for each op that differs; empty if all is as expected."""
    wanted = _counts(manifest)
    found = report.ops
    return [
        f"{name}: expected {count}, got {found[name]}"
        for name, count in sorted(wanted.items())
        if found[name] != count
    ]


def manifest_of(report: Report) -> dict[str, Any]:
    """The manifest that this report meets."""
    return {"format": FORMAT, "ops": dict(sorted(report.ops.items()))}


def _counts(manifest: Mapping[str, Any] | str | Path) -> dict[str, int]:
    where = "the manifest"
    if not isinstance(manifest, Mapping):
        where = str(manifest)
        try:
            manifest = json.loads(Path(where).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"cannot read the manifest {where}: {error}") from error
    ops = manifest.get("ops") if isinstance(manifest, Mapping) else None
    if not isinstance(ops, Mapping) or not all(isinstance(n, int) and n >= 0 for n in ops.values()):
        raise OptionError(f'{where} must hold {{"ops": {{"<op>": <count>}}}} with counts of 0 or more')
    return dict(ops)
