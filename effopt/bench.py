"""Compares ways to run one model, side by side in one process: compile time, latency, error.

Every way is compiled from cold caches. Latencies are taken in interleaved rounds, so that a machine
which slows down slows all of them down, and are compared round by round. The first way is the
reference of the errors.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from effopt.compile import effopt, record
from effopt.errors import OptionError
from effopt.plugins.report import Report

Step = Callable[[], Any]
"""Runs the model once and returns what is compared: outputs, or gradients when training."""

_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Way:
    """One way to run a model."""

    name: str
    backend: Any = None
    """Of `torch.compile`; None runs eagerly."""
    options: Mapping[str, Any] = field(default_factory=dict)


EAGER = Way("eager")
INDUCTOR = Way("inductor", "inductor")
EFFOPT = Way("effopt", effopt)


@dataclass(frozen=True)
class Measured:
    """One way, measured."""

    name: str
    compile_s: float
    """First call less one steady call, from cold caches: Dynamo, passes, backend."""
    latencies_s: tuple[float, ...]
    """Seconds a call, one entry a round."""
    error: float
    """Largest difference from the reference way, relative to the reference's largest value."""
    report: Report
    """What effopt compiled; empty for the other ways."""

    @property
    def latency_s(self) -> float:
        """Median over rounds."""
        return statistics.median(self.latencies_s)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one way is than another: median and quartiles over rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """All ways over one model and its inputs."""

    measured: tuple[Measured, ...]
    machine: Mapping[str, Any]

    def __getitem__(self, name: str) -> Measured:
        return next(m for m in self.measured if m.name == name)

    def speedup(self, name: str, over: str) -> Ratio:
        """Latency of `over` divided by that of `name`, round by round."""
        return ratio_of(self[over].latencies_s, self[name].latencies_s)


def ratio_of(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Of seconds over seconds, round by round; three rounds at least."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def compare(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    ways: Sequence[Way] = (EAGER, INDUCTOR, EFFOPT),
    *,
    train: bool = False,
    rounds: int = 15,
    sample_s: float = 0.05,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compile and time `model` in every way.

    Args:
        model: not changed, but for gradients when training; gradients are set to None after.
        args: positional inputs.
        kwargs: keyword inputs.
        ways: what to compare; the first is the reference.
        train: run forward and backward of the mean square of the outputs, in training mode as set.
        rounds: interleaved rounds, at least 3.
        sample_s: least seconds a round spends in each way.
        progress: told what begins.

    Raises:
        OptionError: fewer than 3 rounds.
    """
    if rounds < _FEWEST_ROUNDS:
        raise OptionError(f"rounds must be at least {_FEWEST_ROUNDS}, for quartiles; got {rounds}")
    progress("starting the compilers")
    _warm_up(ways)
    steps, first_s, results, reports = [], [], [], []
    with torch.set_grad_enabled(train):
        for way in ways:
            progress(f"compiling with {way.name}" if way.backend is not None else "running eagerly")
            with _cold_caches(), record() as report:
                step = _step(model, args, dict(kwargs or {}), way, train)
                seconds, result = _timed(step)
            steps.append(step)
            first_s.append(seconds)
            results.append(result)
            reports.append(report)
        latencies = _interleaved(steps, rounds, sample_s, progress)
    measured = [
        Measured(
            way.name,
            max(0.0, first - min(times)) if way.backend is not None else 0.0,
            tuple(times),
            relative_error(result, results[0]),
            report,
        )
        for way, first, times, result, report in zip(ways, first_s, latencies, results, reports, strict=True)
    ]
    return Comparison(tuple(measured), machine())


def machine() -> dict[str, Any]:
    """What was measured on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def relative_error(got: Any, wanted: Any) -> float:
    """Largest absolute difference over the largest absolute value wanted, over all floating tensors.

    NaN where the two hold NaN in different places, or a different number of tensors.
    """
    ours, theirs = _tensors(got), _tensors(wanted)
    if len(ours) != len(theirs):
        return math.nan
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a.double() - b.double()).abs())
        size = b.double().abs().nan_to_num(0.0, 0.0, 0.0).max().item() if b.numel() else 0.0
        error = difference.max().item() / size if size else difference.sum().item()
        worst = error if math.isnan(error) or error > worst else worst
    return worst


def _tensors(values: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(values)
    return [v.detach() for v in leaves if isinstance(v, torch.Tensor) and v.is_floating_point()]


def _step(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], way: Way, train: bool
) -> Step:
    run = (
        model if way.backend is None else torch.compile(model, backend=way.backend, options=dict(way.options))
    )
    if not train:
        return lambda: run(*args, **kwargs)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def forward_and_backward() -> list[torch.Tensor]:
        outputs = [t for t in pytree.tree_leaves(run(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        loss = sum(t.float().square().mean() for t in outputs if t.is_floating_point() and t.requires_grad)
        assert isinstance(loss, torch.Tensor), "training needs a floating output that requires a gradient"
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    return forward_and_backward


def _timed(step: Step) -> tuple[float, Any]:
    start = time.perf_counter()
    result = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _interleaved(
    steps: Sequence[Step], rounds: int, sample_s: float, progress: Callable[[str], None]
) -> list[list[float]]:
    """Seconds a call, by way and round. Every round starts with another way."""
    calls = []
    for step in steps:
        step()
        calls.append(max(1, round(sample_s / max(_timed(step)[0], 1e-6))))
    times: list[list[float]] = [[] for _ in steps]
    for number in range(rounds):
        progress(f"measuring, round {number + 1} of {rounds}")
        for offset in range(len(steps)):
            i = (number + offset) % len(steps)
            start = time.perf_counter()
            for _ in range(calls[i]):
                steps[i]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[i].append((time.perf_counter() - start) / calls[i])
    return times


@contextmanager
def _cold_caches() -> Iterator[None]:
    """Empty compile caches, in memory and on disk; those of the user are untouched.

    Inductor offers this to its own tests and benchmarks only, so this is the one place that calls it.
    """
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def _warm_up(ways: Sequence[Way]) -> None:
    """Import the compilers and start their workers, so that the first way does not pay for all."""
    if all(way.backend is None for way in ways):
        return
    with _cold_caches(), torch.no_grad():
        for way in ways:
            if way.backend is not None:
                warm = torch.compile(lambda x: (x + 1).sin(), backend=way.backend, options=dict(way.options))
                warm(torch.zeros(4))
