"""The pytest plugin of effopt, active where effopt is installed.

`expect` fails a test when a model loses a fusion; `effopt_report` records what a test compiles. Nothing is
imported before a test asks for one of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from effopt.plugins.report import Report

Expect = Callable[..., "Report"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one switch."""
    group = parser.getgroup("effopt")
    group.addoption(
        "--effopt-update-expect",
        action="store_true",
        help="write the manifests that `expect` reads, from what is found now, instead of comparing",
    )


@pytest.fixture
def effopt_report() -> Iterator[Report]:
    """The report of everything that the test compiles."""
    from effopt.compile import record

    with record() as report:
        yield report


@pytest.fixture
def expect(request: pytest.FixtureRequest) -> Expect:
    """`expect(model, *inputs, manifest=..., options=None, **kwargs)` compiles the model and compares.

    `manifest` is a mapping `{"ops": {"attention": 2}}` or the path of such a JSON file, relative to the
    test's own file. Ops that it does not name are not looked at. With `--effopt-update-expect` a file is
    written instead. Returns the report; raises `UnexpectedOps` that lists the differences and near-misses.
    """
    update = bool(request.config.getoption("--effopt-update-expect"))
    folder = request.path.parent

    def compare(
        model: Callable[..., Any],
        *inputs: Any,
        manifest: Mapping[str, Any] | str | Path,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Report:
        from effopt.compile import explain
        from effopt.plugins import expect as manifests

        report = explain(model, *inputs, options={"lowering": "eager", **(options or {})}, **kwargs)
        if isinstance(manifest, Mapping):
            manifests.expect(report, manifest)
            return report
        path = folder / manifest
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(manifests.manifest_of(report), indent=2) + "\n", encoding="utf-8")
        else:
            manifests.expect(report, path)
        return report

    return compare
