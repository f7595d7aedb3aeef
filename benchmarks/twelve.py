"""The twelve reference architectures, eager attention, against Inductor: latency, compile time, recognition.

    python benchmarks/twelve.py --json benchmarks/results/twelve-cpu.json
    python benchmarks/twelve.py --dynamic --rounds 3

One process, interleaved rounds, medians; `effopt.bench.compare` does the measuring. `checks` is the
share of effopt's compile time that its passes and checks take. `capture` is milliseconds a node of
the captured graph. With --dynamic only the capture is measured, with dynamic shapes and with static
ones in turns, in processor time; the first of each is thrown away, for it pays for imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from effopt.bench import Comparison, compare, machine
from effopt.commands.model import NAMES, Size, load
from effopt.graph.capture import capture


def row(name: str, size: Size, rounds: int) -> dict[str, Any]:
    """Measure one architecture."""
    example = load(name, size)
    torch._dynamo.reset()
    result: Comparison = compare(example.model, example.args, example.kwargs, rounds=rounds, sample_s=0.3)
    effopt, inductor = result["effopt"], result["inductor"]
    ratio = result.speedup("effopt", over="inductor")
    seconds = [g.seconds for g in effopt.report.graphs]
    # A pass's time includes the checks of its rewrites.
    work_s = sum(v for s in seconds for k, v in s.items() if k.startswith("pass:"))
    capture_s = sum(s.get("capture", 0.0) for s in seconds)
    nodes = sum(g.nodes_before for g in effopt.report.graphs)
    return {
        "name": name,
        "attention": effopt.report.ops["attention"],
        "inductor_ms": inductor.latency_s * 1e3,
        "effopt_ms": effopt.latency_s * 1e3,
        "eager_ms": result["eager"].latency_s * 1e3,
        "ratio": [ratio.low, ratio.median, ratio.high],
        "inductor_compile_s": inductor.compile_s,
        "effopt_compile_s": effopt.compile_s,
        "checks_share": work_s / effopt.compile_s,
        "capture_ms_per_node": 1e3 * capture_s / max(1, nodes),
        "error": effopt.error,
    }


def captures(name: str, size: Size, rounds: int) -> dict[bool, list[float]]:
    """Milliseconds of processor time a captured node takes, by whether shapes are dynamic."""
    example = load(name, size)
    taken: dict[bool, list[float]] = {True: [], False: []}

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        start = time.process_time()
        captured = capture(module, inputs)
        spent_s, nodes = time.process_time() - start, len(captured.module.graph.nodes)
        taken[is_dynamic].append(1e3 * spent_s / nodes)
        return module.forward

    for is_dynamic in (True, False) * (rounds + 1):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(example.model, backend=backend, dynamic=is_dynamic)(*example.args, **example.kwargs)
    return {key: values[len(values) // (rounds + 1) :] for key, values in taken.items()}


def print_captures(names: list[str], size: Size, rounds: int) -> None:
    """A row for each architecture: medians, and the highest."""
    print(f"{'capture, ms a node':<20}{'dynamic':>9}{'highest':>9}{'static':>9}{'highest':>9}")
    for name in names:
        taken = captures(name, size, rounds)
        cells = "".join(f"{statistics.median(v):>9.2f}{max(v):>9.2f}" for v in (taken[True], taken[False]))
        print(f"{name:<20}{cells}", flush=True)


def main() -> None:
    """Print the table, the geometric mean and the worst ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", nargs="*", default=list(NAMES))
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--dynamic", action="store_true", help="measure the capture of dynamic shapes, and only that"
    )
    arguments = parser.parse_args()
    size = Size(
        layers=arguments.layers, hidden=arguments.hidden, batch=arguments.batch, tokens=arguments.tokens
    )
    print(f"{size}\n{machine()}")
    if arguments.dynamic:
        print_captures(arguments.only, size, arguments.rounds)
        return
    print(
        f"{'':<10}{'attention':>10}{'eager':>10}{'inductor':>10}{'effopt':>9}{'ratio':>7}{'quartiles':>14}"
        f"{'compile s':>11}{'inductor':>10}{'checks':>8}{'capture':>9}{'error':>9}"
    )
    rows = []
    for name in arguments.only:
        r = row(name, size, arguments.rounds)
        rows.append(r)
        low, median, high = r["ratio"]
        print(
            f"{name:<10}{r['attention']:>10}{r['eager_ms']:>10.1f}{r['inductor_ms']:>10.1f}{r['effopt_ms']:>9.1f}"
            f"{median:>7.2f}{f'({low:.2f}-{high:.2f})':>14}{r['effopt_compile_s']:>11.1f}"
            f"{r['inductor_compile_s']:>10.1f}{r['checks_share']:>8.1%}{r['capture_ms_per_node']:>9.2f}{r['error']:>9.1e}",
            flush=True,
        )
    medians = [r["ratio"][1] for r in rows]
    print(f"geometric mean {statistics.geometric_mean(medians):.3f}, lowest {min(medians):.3f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"machine": machine(), "size": size.__dict__, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
