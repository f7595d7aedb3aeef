"""What every test runs under: few threads, a fresh Dynamo, repeatable draws, GPU tests only with a GPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# One profile for every run, so that CI is never laxer than a developer's machine. Derandomised: a red test is
# red again. No deadline: the first example of a test often pays for a compilation.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, print_blob=True)
# `pytest --hypothesis-profile=explore`: many new draws each time, to look for what nobody thought of.
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile("ci")


def pytest_configure() -> None:
    """Keep workers of pytest-xdist from taking each other's cores."""
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave out of each garbage collection what collecting the tests imported: half a million objects.

    A tenth of the processor time of tests that compile a model.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Nothing is left for extension modules to call a leak at exit."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget compiled code between tests: a cached graph or a recompile limit is not the next test's."""
    if guards := sys.modules.get("torch._dynamo.guards"):
        # For its log alone Dynamo times the guards of each graph, and empties the caches of the processor
        # first: 20 ms of processor time, a tenth of what a small graph takes to compile (torch 2.13).
        guards.profile_guard_manager = lambda *_: 0.0
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Fill `torch.empty` with NaN, so that a kernel which leaves elements unwritten is found. For CPU tests.

    Not for CUDA: the switch behind it also forbids matmul there unless cuBLAS is configured for it.
    """
    was, filled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = filled
