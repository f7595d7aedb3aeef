"""What the programs beside this one time with: a clock, versions in turn, and what the machine reaches.

On a GPU a call is captured in a CUDA graph where it can be, so that its launches from Python are not what is
timed, and runs between two events, after its cache was emptied: the device alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from effopt.backends.measured import stopwatch


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
        again: calls each time, for those that are short beside the clock. Of no use on a GPU.
    """
    if device.type == "cuda":
        return _medians_of_device(calls, device, rounds)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock(device)
            for _ in range(again):
                call()
            times[name].append((clock(device) - start) / again)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _medians_of_device(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, float]:
    timed = stopwatch(device)
    runs = {name: captured(name, call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def captured(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph that is replayed; where it cannot be captured itself, and a word on stderr."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        why = str(error).partition("\n")[0]
        print(f"{name}: timed with its launches, for it was not captured: {why}", file=sys.stderr)
        return call
    return graph.replay


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """What this machine reaches: FLOP/s of a matrix product, bytes/s read and written by a copy."""
    size = 2048 if device.type == "cpu" else 8192
    # Beside 256 MB a GPU's start is long; 1 GiB is what benchmarks/kernels.py copies.
    count = 1 << 26 if device.type == "cpu" else 1 << 28
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(count, device=device)
    into = torch.empty_like(source)
    calls = {"product": lambda: a @ a, "copy": lambda: into.copy_(source)}
    work = {"product": 2.0 * size**3, "copy": 2.0 * source.nbytes}
    if device.type == "cuda":
        seconds = _medians_of_device(calls, device, rounds=20)
    else:
        seconds = {}
        for name, call in calls.items():
            taken = []
            for _ in range(4):
                start = clock(device)
                call()
                taken.append(clock(device) - start)
            seconds[name] = min(taken[1:])
    return work["product"] / seconds["product"], work["copy"] / seconds["copy"]
