"""Time every Triton kernel against eager PyTorch and Inductor, as a fraction of what a copy reaches.

    python benchmarks/kernels.py [op names] [--json FILE] [--seconds N]

For each op, shape and pass (forward; forward and backward where a kernel has one) it runs every lowering that
takes the call, the op's reference in eager PyTorch and, but for attention, compiled by Inductor; and for
layers on integer weights the float layer. GB/s counts the fewest bytes that the pass must move, the same for
all versions, so one that moves more shows less; TFLOP/s counts what a band leaves to compute, likewise. Every
version is compared with float64 first, relative to the largest value; one that is wrong is not timed, and
makes the program fail. Prints a table, and needs a GPU. Prefill and decode, block-sparse and linear attention
have sections of benchmarks/attention.py; benchmarks/gpu.py runs them all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import torch
from timing import ceilings, medians
from torch import Tensor
from torch.nn import functional as F

from effopt.bench import machine
from effopt.graph import ops
from effopt.graph.ops import Sample
from effopt.graph.ops.base import Op, tensor_bytes
from effopt.graph.round_to_nearest import quantize_rows
from effopt.plugins.manager import build_registry
from effopt.target import target_of

DTYPE, ROUNDS = torch.bfloat16, 20
DEVICE = torch.device("cuda")
TOLERANCE, GRADIENT_TOLERANCE = 2e-2, 4e-2
"""Greatest difference, relative to the largest value: 5 and 10 roundings of bfloat16."""


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def norm_calls(name: str) -> Iterator[tuple[str, Sample]]:
    """Hidden states of a 1B to 70B model, and a query-key norm over 128."""
    for rows, d in ((8192, 2048), (8192, 4096), (8192, 8192), (8192 * 32, 128), (16, 4096)):
        x, residual, weight, bias = random(rows, d), random(rows, d), random(d), random(d)
        args: dict[str, tuple[Any, ...]] = {
            "rms_norm": (x, weight, 1e-6),
            "add_rms_norm": (x, residual, weight, 1e-6),
            "layer_norm": (x, [d], weight, bias, 1e-5),
            "add_layer_norm": (x, residual, weight, bias, 1e-5),
        }
        yield f"{rows}x{d}", Sample(args[name], {})


def glu_calls(_: str) -> Iterator[tuple[str, Sample]]:
    """Two projections, and the halves of a fused one."""
    for rows, n in ((8192, 11008), (8192, 14336), (16, 14336)):
        for activation in ("silu", "gelu_tanh"):
            yield f"{rows}x{n} {activation}", Sample((random(rows, n), random(rows, n), activation), {})
    gate, up = random(8192, 2 * 11008).chunk(2, dim=-1)
    yield "8192x11008 silu, halves", Sample((gate, up, "silu"), {})


def rope_calls(_: str) -> Iterator[tuple[str, Sample]]:
    """Queries as a projection leaves them, `[b, t, h, d]`, seen as `[b, h, t, d]`."""
    for b, h, t, d in ((4, 32, 2048, 128), (1, 32, 8192, 64), (16, 32, 1, 128)):
        x, angle = random(b, t, h, d).transpose(1, 2), random(1, 1, t, d)
        for interleaved in (False, True):
            name = f"{b}x{h}x{t}x{d}" + " interleaved" * interleaved
            yield name, Sample((x, angle.cos(), angle.sin()), {"interleaved": interleaved})


def attention_calls(_: str) -> Iterator[tuple[str, Sample]]:
    """Prefill and decode with grouped queries: plain, causal, windowed, soft-capped, with sinks, padded."""
    for b, t, s, d in ((1, 4096, 4096, 128), (4, 2048, 2048, 64), (1, 1, 8192, 128), (16, 1, 8192, 128)):
        q, (k, v) = random(b, 32, t, d), (random(b, 8, s, d) for _ in range(2))
        causal = {"low": None, "high": s - t, "rows_see_key": True}
        padding = (torch.arange(s, device=DEVICE) >= s // 4).view(1, 1, 1, s)
        for name, more in {
            "plain": {},
            "causal": causal | ({"high": None, "is_causal": True} if t == s else {}),
            "window 1024": causal | {"low": s - t - 1023},
            "soft-cap": causal | {"softcap": 50.0},
            "sinks": causal | {"sinks": random(32)},
            "padded": {"mask": padding, "rows_see_key": True},
        }.items():
            yield f"{b}x32:8x{t}x{s}x{d} {name}", Sample((q, k, v), {"scale": d**-0.5, **more})


def integer_calls(name: str) -> Iterator[tuple[str, Sample]]:
    """Layers of an 8B model, of 8 bits and, where the op has them, of 4 in groups of 128."""
    for rows in (1, 16, 512, 8192):
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
            x, weight = random(rows, k), random(n, k) / k**0.5
            for bits, group in ((8, 0), (4, 128)) if name == "quantized_linear" else ((8, 0),):
                packed, scale, *_ = quantize_rows(weight, bits=bits, group=group, symmetric=True)
                more = {"bits": bits, "group": group} if name == "quantized_linear" else {}
                args = (x, packed, scale, None, None) if more else (x, packed, scale, None)
                yield f"{rows}x{k}->{n} {bits} bits", Sample(args, more)


def scan_calls(_: str) -> Iterator[tuple[str, Sample]]:
    """Mamba of 370M and 2.8B parameters."""
    for b, d, t, n in ((1, 2048, 2048, 16), (8, 2048, 2048, 16), (1, 5120, 2048, 16)):
        u, delta, a = random(b, d, t), random(b, d, t).sigmoid(), -random(d, n).float().exp()
        yield f"{b}x{d}x{t}x{n}", Sample((u, delta, a, random(b, n, t), random(b, n, t)), {})


CALLS = {
    **dict.fromkeys(("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"), norm_calls),
    **dict.fromkeys(("quantized_linear", "int8_linear"), integer_calls),
    "glu": glu_calls,
    "rope": rope_calls,
    "selective_scan": scan_calls,
    "attention": attention_calls,
}
INTEGERS = ("quantized_linear", "int8_linear")
"""Layers on integer weights, of inference only."""
WITHOUT_INDUCTOR = ("attention", "selective_scan")
"""Whose references Inductor takes long to compile, for a call of all scores or a loop over time."""
Version = Callable[..., Any]
"""A function of the tensors among a sample's operands."""


def versions_of(op: Op, sample: Sample, training: bool) -> dict[str, Version]:
    """Lowerings that take the call, with their weights laid out; the reference last, in two ways."""
    target, operands = target_of(DEVICE), dict(op.bind(sample.args, sample.kwargs))
    names = [name for name, value in operands.items() if isinstance(value, Tensor)]
    found: dict[str, Version] = {}
    for low in build_registry().lowerings[op.name]:
        taken = low.supports(target, operands) is None and (low.differentiable or not training)
        if low.name != "reference" and taken:
            laid = {**operands, **{name: lay_out(operands[name]) for name, lay_out in low.prepack.items()}}
            rest = {name: laid[name] for name in low.prepack}
            found[low.name] = lambda *x, low=low, rest=rest: low.call(
                **{**operands, **dict(zip(names, x, strict=True)), **rest}
            )

    def reference(*x: Tensor) -> Any:
        return op.reference(**{**operands, **dict(zip(names, x, strict=True))})

    found["eager"] = reference
    if op.name not in WITHOUT_INDUCTOR:
        torch._dynamo.reset()
        found["inductor"] = torch.compile(reference, dynamic=False, fullgraph=True)
    if op.name in INTEGERS:
        weight = random(operands["scale"].shape[0], operands["input"].shape[-1])
        found["float"] = lambda x, *_: F.linear(x, weight)
    return found


def double(value: Any) -> Any:
    """In float64, if it is a floating tensor."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def expected_of(op: Op, sample: Sample) -> tuple[Tensor, ...]:
    """The reference in float64; for codes of the input, which depend on its dtype, in its own."""
    if op.name == "int8_linear":
        return outputs(op.reference(*sample.args, **sample.kwargs))
    named = {name: double(value) for name, value in sample.kwargs.items()}
    return outputs(op.reference(*map(double, sample.args), **named))


def measure(op: Op, shape: str, sample: Sample, most: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """All versions of one call, both passes."""
    operands = op.bind(sample.args, sample.kwargs)
    tensors = tuple(x for x in operands.values() if isinstance(x, Tensor))
    with torch.no_grad():
        result, expected = op.reference(*sample.args, **sample.kwargs), expected_of(op, sample)
    forward_bytes, flops = op.bytes_moved(operands, result), op.flops(operands, result)
    calls = {
        name: lambda run=run: outputs(run(*tensors)) for name, run in versions_of(op, sample, False).items()
    }
    exact = {n: c for n, c in calls.items() if n != "float"}
    with torch.no_grad():
        taken, refused = peers.that_run(exact, expected, TOLERANCE)
        taken |= {n: c for n, c in calls.items() if n == "float"}
        times = medians(taken, DEVICE, ROUNDS)
    yield from rows(op.name, shape, "forward", times, refused, forward_bytes, flops, most)
    if op.name in INTEGERS:
        return
    upstream = [torch.randn_like(o) for o in outputs(result)]
    # Of cos and sin of a rotation no one asks for gradients.
    wanted = [x.requires_grad_() for x in (tensors[:1] if op.name == "rope" else tensors) if is_float(x)]
    steps = {
        name: lambda run=run: torch.autograd.grad(
            outputs(run(*tensors)), wanted, upstream, allow_unused=True, materialize_grads=True
        )
        for name, run in versions_of(op, sample, True).items()
    }
    # Backward reads the operands and the gradients of the results, and writes those of the operands.
    both_bytes = forward_bytes + tensor_bytes(tensors) + tensor_bytes(upstream) + tensor_bytes(wanted)
    taken, refused = peers.that_run(steps, steps["eager"](), GRADIENT_TOLERANCE)
    times = medians(taken, DEVICE, ROUNDS)
    yield from rows(op.name, shape, "forward+backward", times, refused, both_bytes, 3.0 * flops, most)


def is_float(x: Tensor) -> bool:
    return x.is_floating_point()


def rows(
    op: str,
    shape: str,
    direction: str,
    times: dict[str, float],
    refused: dict[str, str],
    moved: float,
    flops: float,
    most: tuple[float, float],
) -> Iterator[dict[str, Any]]:
    """Printed, and as they are kept."""
    what = {"op": op, "shape": shape, "direction": direction}
    for name, why in refused.items():
        print(f"{op:15} {shape:32} {direction:17} {name:18} {why}", flush=True)
        yield {**what, "version": name, "why_not": why}
    for name, seconds in times.items():
        rate, work = moved / seconds, flops / seconds
        figures = f"{1e6 * seconds:9.1f} us {rate / 1e9:7.0f} GB/s {rate / most[1]:5.2f} of copy"
        figures += f" {work / 1e12:7.1f} TFLOP/s"
        print(f"{op:15} {shape:32} {direction:17} {name:18} {figures}", flush=True)
        reached = {"gigabytes_per_s": rate / 1e9, "fraction_of_copy": rate / most[1]}
        reached |= {"teraflops_per_s": work / 1e12, "fraction_of_product": work / most[0]}
        yield {**what, "version": name, "microseconds": 1e6 * seconds, **reached}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CALLS)}; all of them if none is named")
    parser.add_argument("--seconds", type=float, help="begin no further shape after so long")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if set(arguments.ops) - set(CALLS):
        parser.error(f"unknown op {sorted(set(arguments.ops) - set(CALLS))}; there are {', '.join(CALLS)}")
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a GPU: torch.cuda.is_available() is False here", file=sys.stderr)
        return 1
    start, most = time.perf_counter(), ceilings(DEVICE, DTYPE)
    found: dict[str, Any] = {"machine": machine(), "dtype": str(DTYPE), "measurements": [], "left_out": []}
    found["ceilings"] = {"matmul_flops_per_s": most[0], "copy_bytes_per_s": most[1]}
    print(f"{found['machine']}, product {most[0] / 1e12:.0f} TFLOP/s, copy {most[1] / 1e9:.0f} GB/s, {DTYPE}")
    for name in arguments.ops or CALLS:
        for shape, sample in CALLS[name](name):
            if arguments.seconds and time.perf_counter() - start > arguments.seconds:
                found["left_out"].append(f"{name} {shape}")
                continue
            found["measurements"] += measure(getattr(ops, name), shape, sample, most)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if found["left_out"]:
        print(f"left out after {arguments.seconds:g} s: {', '.join(found['left_out'])}")
    wrong = [m for m in found["measurements"] if m.get("why_not", "").startswith("WRONG")]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
