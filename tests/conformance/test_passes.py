"""Everything registered, tested without knowing what it does."""

from __future__ import annotations

import pytest

from effopt.passes.base import Rewrite
from effopt.plugins.manager import build_registry
from effopt.testing import check_pass

REGISTRY = build_registry()


@pytest.mark.parametrize("name", REGISTRY.passes)
def test_pass(name: str) -> None:
    class_ = REGISTRY.passes[name]
    done = check_pass(class_)
    assert done.samples
    assert done.variants >= done.samples
    assert done.mutants or not (issubclass(class_, Rewrite) and class_.exact), done.unmutated


def test_nothing_failed_to_register() -> None:
    assert not REGISTRY.faults


@pytest.mark.parametrize("name", REGISTRY.passes)
def test_file_and_class_are_named_after_the_pass(name: str) -> None:
    class_ = REGISTRY.passes[name]
    if not class_.__module__.startswith("effopt."):
        pytest.skip(f"{name} comes from another package, {class_.__module__}")
    assert class_.__module__.split(".")[-1] == name.replace("-", "_")
    assert class_.__name__.lower() == name.replace("-", "").lower()
