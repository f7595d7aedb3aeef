"""Time every CPU lowering of a quantised linear layer against the floating-point layer that it replaces.

    python benchmarks/quantized.py --json benchmarks/results/quantized-cpu.json

For each dtype of the activations, shape of the weight and number of rows: the float layer, each lowering that
supports the operands, compiled by Inductor, and PyTorch's own kernels for packed weights. Time is that of
the calling thread, one thread, the least of interleaved rounds, so that other work on the machine moves it
little; weights are taken in turn from copies that no second-level cache holds. `floor` is how much faster
than float a layer can be where reading the weight is what takes time: float bytes over packed bytes.
`predicted` is the cost by which lowerings are chosen; `*` marks the one chosen. Results are compared with
float64 before they are timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from effopt.backends.base import Lowering, choose
from effopt.backends.int8_products import LOWERINGS as INT8_PRODUCTS
from effopt.backends.quantized import LOWERINGS as QUANTIZED
from effopt.backends.reference import reference_lowering
from effopt.bench import machine
from effopt.graph import ops
from effopt.graph.packing import unpack
from effopt.graph.round_to_nearest import quantize_rows
from effopt.target import target_of

CPU = target_of(torch.device("cpu"))
SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096), (32000, 1024))
ROWS = (1, 4, 16, 128, 512)
FORMS = {"int8": (8, 0), "int4-128": (4, 128)}
"""Name -> bits and group of a weight."""
TURNED_BYTES = 1.5e8
"""Float weights that are taken in turn."""


@dataclass(frozen=True)
class Case:
    """One float layer."""

    dtype: torch.dtype
    n: int
    k: int
    rows: int


@dataclass(frozen=True)
class Measurement:
    """One version of one layer."""

    dtype: str
    n: int
    k: int
    rows: int
    form: str
    version: str
    microseconds: float
    speedup: float
    """Over the float layer."""
    floor: float
    """Largest speedup that the bytes of the weight allow."""
    predicted_us: float | None
    is_chosen: bool


@dataclass
class Version:
    """A layer that can be run: `call(x, *weights)` for each of `copies`."""

    form: str
    name: str
    call: Callable[..., Any]
    copies: list[tuple[Tensor, ...]]
    predicted_s: float | None = None
    is_chosen: bool = False
    best_s: float = float("inf")

    def round(self, x: Tensor) -> None:
        """Run all copies once, and keep the time of one if it is the least so far."""
        start = time.thread_time()
        for weights in self.copies:
            self.call(x, *weights)
        self.best_s = min(self.best_s, (time.thread_time() - start) / len(self.copies))


def compiled(call: Callable[..., Any], *args: Tensor) -> Any:
    """`call` through Inductor, without the guards that Dynamo would check at each call."""
    return torch._inductor.compile(make_fx(call)(*args), list(args))


def turned(weights: tuple[Tensor, ...], count: int) -> list[tuple[Tensor, ...]]:
    return [tuple(w.clone() for w in weights) for _ in range(count)]


def lowerings_of(op: Any) -> list[Lowering]:
    return [low for low in (*QUANTIZED, *INT8_PRODUCTS) if low.op is op] + [reference_lowering(op)]


def versions(case: Case, x: Tensor, weight: Tensor, count: int) -> Iterator[Version]:
    """The float layer, and what may replace it."""
    yield Version("float", "linear", compiled(F.linear, x, weight), turned((weight,), count))
    for form, (bits, group) in FORMS.items():
        packed, scale = quantize_rows(weight, bits=bits, group=group, symmetric=True)
        settings = {"bits": bits, "group": group}
        yield from lowered(ops.quantized_linear, form, x, (packed, scale), settings, count)
    packed, scale = quantize_rows(weight, bits=8, group=0, symmetric=True)
    yield from lowered(ops.int8_linear, "int8 x int8", x, (packed, scale), {}, count)
    yield from library(case, x, weight, count)


def lowered(
    op: Any, form: str, x: Tensor, weights: tuple[Tensor, ...], settings: dict[str, Any], count: int
) -> Iterator[Version]:
    """Each lowering of an op that supports the operands."""
    operands = op.bind((x, *weights), settings)
    result = op.fake(x, *weights, **settings)
    candidates = lowerings_of(op)
    chosen = choose(candidates, CPU, operands, result, False).lowering
    exact = op.reference(x.double(), weights[0], weights[1].double(), **settings)
    for lowering in candidates:
        if lowering.supports(CPU, operands) is not None:
            continue

        def run(x: Tensor, *weights: Tensor, lowering: Lowering = lowering) -> Any:
            return lowering.call(x, *weights, **settings)

        call = compiled(run, x, *weights)
        error = (call(x, *weights).double() - exact).norm() / exact.norm()
        assert error < (1e-5 if x.dtype == torch.float32 else 1e-2), (op.name, lowering.name, error)
        cost = lowering.cost(CPU, operands, result)
        yield Version(form, lowering.name, call, turned(weights, count), cost, lowering is chosen)


def library(case: Case, x: Tensor, weight: Tensor, count: int) -> Iterator[Version]:
    """PyTorch's own kernels, each with weights in the layout that it wants. Without AVX-512 code for it,
    float32 takes minutes."""
    if case.dtype == torch.float32 or case.rows > 16:
        return
    packed, scale = quantize_rows(weight, bits=8, group=0, symmetric=True)
    signed = packed.bitwise_xor(128).view(torch.int8)
    yield Version("int8", "int8pack_mm", torch._weight_int8pack_mm, turned((signed, scale[:, 0]), count))
    packed, scale = quantize_rows(weight, bits=4, group=128, symmetric=True)
    layout = torch._convert_weight_to_int4pack_for_cpu(unpack(packed, 4, case.k).to(torch.int32), 1)
    pairs = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()
    yield Version("int4-128", "int4pack_mm", run_int4pack, turned((layout, pairs), count))


def run_int4pack(x: Tensor, layout: Tensor, pairs: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, layout, 128, pairs)


def floor_of(version: Version, weight: Tensor) -> float:
    return weight.nbytes / sum(t.nbytes for t in version.copies[0])


def measure(case: Case, rounds: int) -> list[Measurement]:
    """All versions of one layer, in interleaved rounds."""
    weight = (0.02 * torch.randn(case.n, case.k)).to(case.dtype)
    x = torch.randn(case.rows, case.k).to(case.dtype)
    found = list(versions(case, x, weight, max(1, min(16, int(TURNED_BYTES / (4 * case.n * case.k))))))
    for _ in range(rounds):
        for version in found:
            version.round(x)
    return [
        Measurement(
            str(case.dtype).removeprefix("torch."),
            *(case.n, case.k, case.rows, v.form, v.name, v.best_s * 1e6, found[0].best_s / v.best_s),
            floor_of(v, weight),
            None if v.predicted_s is None else v.predicted_s * 1e6,
            v.is_chosen,
        )
        for v in found
    ]


def show(found: list[Measurement]) -> None:
    for m in found:
        mark = "*" if m.is_chosen else ""
        predicted = f"{m.predicted_us:10.0f}" if m.predicted_us is not None else " " * 10
        print(
            f"{m.dtype:9}{f'{m.n}x{m.k}':>11}{m.rows:5}  {m.form:12}{m.version + mark:14}"
            f"{m.microseconds:9.0f}{predicted}{m.speedup:8.2f}{m.floor:7.1f}",
            flush=True,
        )


def write(path: Path, results: list[Measurement]) -> None:
    """After each layer, since all of them take half an hour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "rows": [asdict(m) for m in results]}
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--shapes", nargs="*", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(machine())
    print(
        f"{'dtype':9}{'weight':>11}{'rows':>5}  {'form':12}{'version':14}"
        f"{'us':>9}{'predicted':>10}{'speedup':>8}{'floor':>7}"
    )
    results: list[Measurement] = []
    for dtype in arguments.dtypes:
        for shape in arguments.shapes:
            n, k = map(int, shape.split("x"))
            for rows in arguments.rows:
                case = Case(getattr(torch, dtype), n, k, rows)
                found = measure(case, arguments.rounds if rows < 100 else max(3, arguments.rounds // 3))
                show(found)
                results += found
                if arguments.json:
                    write(arguments.json, results)


if __name__ == "__main__":
    main()
