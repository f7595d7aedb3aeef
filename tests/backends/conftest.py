"""Fixtures for tests of lowerings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from effopt.backends import measurements


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing known yet, and a folder of this test for what is measured."""
    measurements.forget()
    monkeypatch.setattr(measurements, "folder", lambda: tmp_path)
    yield tmp_path
    measurements.forget()
