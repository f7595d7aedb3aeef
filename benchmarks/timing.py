"""What the programs beside this one time with: a clock, versions in turn, and what the machine reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def clock(device: torch.device) -> float:
    """Seconds: of this thread on a CPU, of the device otherwise."""
    if device.type == "cpu":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def medians(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, again: int = 1
) -> dict[str, float]:
    """Seconds a call of each version, run in turn: the median of `rounds`, after one that is not counted.

    Args:
        calls: versions by name.
        device: they run on it.
        rounds: times that each is timed.
        again: calls each time, for those that are short beside the clock.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock(device)
            for _ in range(again):
                call()
            times[name].append((clock(device) - start) / again)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """What this machine reaches: FLOP/s of a matrix product, bytes/s read and written by a copy of 256 MB."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(1 << 26, device=device)
    into = torch.empty_like(source)
    found = []
    for call, work in ((lambda: a @ a, 2.0 * size**3), (lambda: into.copy_(source), 2.0 * 4 * (1 << 26))):
        seconds = []
        for _ in range(4):
            start = clock(device)
            call()
            seconds.append(clock(device) - start)
        found.append(work / min(seconds[1:]))
    return found[0], found[1]
