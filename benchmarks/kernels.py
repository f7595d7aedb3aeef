"""Time every Triton kernel against eager PyTorch and Inductor, as a fraction of what a copy reaches.

    python benchmarks/kernels.py [op names]

For each op, shape and pass (forward; forward and backward where the kernel has one) it runs the kernel, the
op's reference in eager PyTorch, the reference compiled by Inductor, and for attention the library's kernel
where it takes the call. GB/s counts the fewest bytes that the pass must move, the same for all versions, so
one that moves more shows less; TFLOP/s counts what a band leaves to compute, likewise. Every version is
compared with float64 before it is timed. Prints a table and writes benchmarks/results/<gpu>.json.
Needs a GPU. The kernels on integer weights have a benchmark of their own, benchmarks/quantized.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.backends.native import LOWERINGS as NATIVE
from effopt.backends.triton import LOWERINGS
from effopt.graph.ops import Sample
from effopt.graph.ops.base import tensor_bytes
from effopt.graph.tolerances import GRADIENT_FACTOR, TOLERANCES
from effopt.target import target_of

DTYPE = torch.bfloat16
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measurement:
    """One version of one pass of one op."""

    op: str
    shape: str
    direction: str
    version: str
    microseconds: float
    gigabytes_per_s: float
    fraction_of_copy: float
    teraflops_per_s: float


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


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
        padding = (torch.arange(s, device="cuda") >= s // 4).view(1, 1, 1, s)
        for name, more in {
            "plain": {},
            "causal": causal | ({"high": None, "is_causal": True} if t == s else {}),
            "window 1024": causal | {"low": s - t - 1023},
            "soft-cap": causal | {"softcap": 50.0},
            "sinks": causal | {"sinks": random(32)},
            "padded": {"mask": padding, "rows_see_key": True},
        }.items():
            yield f"{b}x32:8x{t}x{s}x{d} {name}", Sample((q, k, v), {"scale": d**-0.5, **more})


CALLS = {
    **dict.fromkeys(("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"), norm_calls),
    "glu": glu_calls,
    "rope": rope_calls,
    "attention": attention_calls,
}


def calls(lowering: Lowering) -> Iterator[tuple[str, Sample]]:
    return CALLS[lowering.op.name](lowering.op.name)


def versions_of(lowering: Lowering, sample: Sample) -> dict[str, Callable[..., Any]]:
    """The kernel, and what else runs the call: library kernels that take it, the reference in two ways."""
    op, target = lowering.op, target_of(torch.device("cuda"))
    operands = op.bind(sample.args, sample.kwargs)
    library = (n for n in NATIVE if n.op is op and n.supports(target, operands) is None)
    return {
        lowering.name: lowering.call,
        **{n.name: n.call for n in library},
        "eager": op.reference,
        "inductor": torch.compile(lambda *a, **k: op.reference(*a, **k), dynamic=False, fullgraph=True),
    }


def double(value: Any) -> Any:
    """In float64, if it is a floating tensor."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def wanting(lowering: Lowering, sample: Sample) -> list[Tensor]:
    """The operands that training differentiates: all but cos and sin."""
    tensors = [a for a in sample.args if isinstance(a, Tensor)]
    return tensors[:1] if lowering.op.name == "rope" else tensors


def step(call: Callable[..., Any], sample: Sample, wanted: list[Tensor], upstream: list[Tensor]) -> Any:
    """Forward and backward, as one function without arguments."""
    return lambda: torch.autograd.grad(outputs(call(*sample.args, **sample.kwargs)), wanted, upstream)


def check(actual: Any, expected: Any, factor: float) -> None:
    """Within the table of the dtype, for tuples of tensors."""
    allowed = TOLERANCES[DTYPE]
    for got, exact in zip(actual, expected, strict=True):
        bound = factor * allowed.rtol
        torch.testing.assert_close(got.double(), exact.double(), rtol=bound, atol=bound)


def median_us(run: Callable[[], Any]) -> float:
    import triton

    return 1e3 * float(triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"))


def copy_bytes_per_s() -> float:
    """What this GPU reaches when it copies 1 GiB: the measure of all below."""
    source = torch.empty(2**29, device="cuda", dtype=DTYPE).normal_()
    target = torch.empty_like(source)
    return 2.0 * tensor_bytes(source) / (median_us(lambda: target.copy_(source)) * 1e-6)


def measure(lowering: Lowering, shape: str, sample: Sample, copy: float) -> Iterator[Measurement]:
    """All versions of one call. Raises if one of them is wrong."""
    torch._dynamo.reset()
    op, wanted = lowering.op, wanting(lowering, sample)
    operands = op.bind(sample.args, sample.kwargs)
    with torch.no_grad():
        result = op.reference(*sample.args, **sample.kwargs)
    upstream = [torch.randn_like(o) for o in outputs(result)]
    forward_bytes = op.bytes_moved(operands, result)
    # Backward reads the operands and the gradients of the results, and writes those of the operands.
    both_bytes = (
        forward_bytes + tensor_bytes([*operands.values()]) + tensor_bytes(upstream) + tensor_bytes(wanted)
    )
    versions, flops = versions_of(lowering, sample), op.flops(operands, result)
    named = {name: double(value) for name, value in sample.kwargs.items()}
    with torch.no_grad():
        expected = outputs(op.reference(*map(double, sample.args), **named))
    for name, call in versions.items():

        def forward(call: Callable[..., Any] = call) -> Any:
            with torch.no_grad():
                return outputs(call(*sample.args, **sample.kwargs))

        check(forward(), expected, 1.0)
        yield report(op.name, shape, "forward", name, forward, forward_bytes, flops, copy)
    if not lowering.differentiable:
        return
    tensors = [t.requires_grad_() for t in wanted]
    reference_step = step(op.reference, sample, tensors, upstream)()
    for name, call in versions.items():
        both = step(call, sample, tensors, upstream)
        check(both(), reference_step, GRADIENT_FACTOR)
        yield report(op.name, shape, "forward+backward", name, both, both_bytes, 3.0 * flops, copy)


def report(
    op: str,
    shape: str,
    direction: str,
    version: str,
    run: Callable[[], Any],
    moved: float,
    flops: float,
    copy: float,
) -> Measurement:
    us = median_us(run)
    rate, work = moved / (us * 1e-6), flops / us * 1e-6
    figures = f"{us:9.1f} us {rate / 1e9:7.0f} GB/s {rate / copy:5.2f} {work:7.1f} TFLOP/s"
    print(f"{op:15} {shape:32} {direction:17} {version:14} {figures}")
    return Measurement(op, shape, direction, version, us, rate / 1e9, rate / copy, work)


def main() -> int:
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a GPU: torch.cuda.is_available() is False here", file=sys.stderr)
        return 1
    if not LOWERINGS:
        print("benchmarks/kernels.py needs Triton, which is not installed", file=sys.stderr)
        return 1
    names = {lowering.op.name for lowering in LOWERINGS} & set(CALLS)
    asked = set(sys.argv[1:]) or names
    if asked - names:
        print(f"unknown op {sorted(asked - names)}; there are {sorted(names)}", file=sys.stderr)
        return 2
    import triton

    gpu, copy = torch.cuda.get_device_name(), copy_bytes_per_s()
    print(
        f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, copy {copy / 1e9:.0f} GB/s, {DTYPE}"
    )
    measured: list[dict[str, Any]] = []
    for lowering in (entry for entry in LOWERINGS if entry.op.name in asked):
        for shape, sample in calls(lowering):
            measured += [asdict(m) for m in measure(lowering, shape, sample, copy)]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")
    facts = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "dtype": str(DTYPE)}
    path.write_text(json.dumps({**facts, "copy_gigabytes_per_s": copy / 1e9, "measured": measured}, indent=1))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
