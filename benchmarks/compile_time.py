"""Cold compile time of a deep Llama: effopt, Inductor, and Inductor with Dynamo's graph deduplication.

    python benchmarks/compile_time.py --layers 24
    python benchmarks/compile_time.py --layers 12 --train

Each measurement is a process of its own with empty caches; the ways take turns, so that a machine
that slows down slows all of them down. Compile time is the first call (with --train: forward and
backward) less one later call; processor time is that of the process and of its C++ compilers.
`error` compares logits, `gradient error` parameter gradients, with eager, each relative to the
largest value; a way that is fast and wrong is shown as wrong. What a way does once in an empty cache
directory, whatever the model (imports, probing the vector instructions, one first kernel), is paid
before, by the compilation of one line; `with start` is the sum of both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("inductor", "deduplicated", "effopt")


def measure(way: str, layers: int, hidden: int, tokens: int, train: bool) -> dict[str, Any]:
    """Compile once in this process and compare with eager."""
    import torch

    from effopt.bench import relative_error
    from effopt.commands.model import Size, load
    from effopt.compile import effopt, record

    example = load("llama", Size(layers=layers, hidden=hidden, heads=8, tokens=tokens))
    torch._dynamo.config.use_graph_deduplication = way == "deduplicated"
    run_by: Any = effopt if way == "effopt" else "inductor"
    run = torch.compile(example.model, backend=run_by)
    parameters = list(example.model.parameters())

    def step(function: Any) -> tuple[Any, Any]:
        logits = function(*example.args, **example.kwargs).logits
        target = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
        return logits, torch.autograd.grad((logits * target).sum(), parameters) if train else ()

    with torch.set_grad_enabled(train), record() as report:
        start = time.perf_counter()
        warm_up(torch, run_by)
        start_s = time.perf_counter() - start
        start, start_processor = time.perf_counter(), processor_s()
        got = step(run)
        middle, middle_processor = time.perf_counter(), processor_s()
        step(run)
        end, end_processor = time.perf_counter(), processor_s()
        wanted = step(example.model)
    graph = report.graphs[-1] if report.graphs else None  # the first is that of `warm_up`
    return {
        "way": way,
        "start_s": start_s,
        "compile_s": 2 * middle - start - end,
        "processor_s": 2 * middle_processor - start_processor - end_processor,
        "error": relative_error(got[0], wanted[0]),
        "gradient_error": max(
            (relative_error(a, b) for a, b in zip(got[1], wanted[1], strict=True)), default=0.0
        ),
        "stages_s": graph.seconds if graph else {},
        "nodes": graph.nodes_before if graph else 0,
    }


def processor_s() -> float:
    """Processor time of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def warm_up(torch: Any, backend: Any) -> None:
    """Pay for imports and the compiler's start in an empty cache directory once; reported as `start_s`."""
    torch.compile(lambda x: torch.tanh(x).sum(-1), backend=backend)(torch.ones(2, 64))
    torch._dynamo.reset()


def in_a_process(arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    """`measure` in a process with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
        command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        shape = (arguments.layers, arguments.hidden, arguments.tokens, arguments.train)
        print(json.dumps(measure(arguments.way, *shape)))
        return
    measured: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            measured[way].append(in_a_process(arguments, way))
    for run in (run for runs in measured.values() for run in runs):
        run["cold_s"] = run["start_s"] + run["compile_s"]
    columns = ("compile_s", "cold_s", "processor_s")
    baselines = {key: statistics.median(m[key] for m in measured["inductor"]) for key in columns}
    mode = "training" if arguments.train else "inference"
    print(f"Llama, {arguments.layers} layers, hidden {arguments.hidden}, {mode}")
    titles = f"{'way':<14}{'compile s':>10}{'low':>8}{'high':>8}{'of Inductor':>13}"
    titles += f"{'with start':>12}{'of Inductor':>13}{'processor s':>13}{'of Inductor':>13}"
    print(f"{titles}{'error':>10}{'gradient error':>16}")
    for way, runs in measured.items():
        times = [m["compile_s"] for m in runs]
        error, gradient = max(m["error"] for m in runs), max(m["gradient_error"] for m in runs)
        shown = f"{gradient:.1e}" if arguments.train else "-"
        medians = {key: statistics.median(m[key] for m in runs) for key in columns}
        ratios = {key: f"{medians[key] / baselines[key]:>13.2f}" for key in columns}
        seconds = f"{medians['compile_s']:>10.1f}{min(times):>8.1f}{max(times):>8.1f}{ratios['compile_s']}"
        seconds += f"{medians['cold_s']:>12.1f}{ratios['cold_s']}"
        seconds += f"{medians['processor_s']:>13.1f}{ratios['processor_s']}"
        print(f"{way:<14}{seconds}{error:>10.1e}{shown:>16}")
    stages = measured["effopt"][-1]["stages_s"]
    print("effopt stages, s: " + ", ".join(f"{k} {v:.2f}" for k, v in stages.items() if v >= 0.05))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
