"""What the kernels here share: how rows are viewed, how a tile is chosen, what every kernel refuses.

A norm reads a row once and keeps it in registers, so its tile is whole rows: several short ones or
one long one. All launches go through `launch`, the one place that knows about devices and the
interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from triton.runtime.jit import JITFunction

from effopt.graph.ops.base import Op, Operands
from effopt.target import Target

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_ROW, MAX_ROW_FLOAT64 = 8192, 2048
"""Longest row that one program keeps in registers, by the dtype of accumulation.

At 16 warps, 8192 float32 are 16 values a thread, and the backward pass of layer norm, which holds four
tiles and two sums, takes 125 of the 128 registers that sm_90 leaves it. At 16384 it spills 344 to 744
bytes a thread on sm_80, sm_90 and sm_100; so do 4096 float64, 40 to 64 bytes (ptxas of Triton 3.9).
The bound is tested in tests/backends/triton/test_aot.py.
"""
LAUNCH_S = 4.0e-6
"""Time of an empty kernel, launched from Python: the floor of every cost here."""


@dataclass(frozen=True)
class Tile:
    """Whole rows that one program holds: `rows x columns` elements, both powers of two."""

    rows: int
    columns: int
    warps: int

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Launch options of a row kernel on operands of `dtype`; float64 accumulates in float64."""
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        return {"ROWS": self.rows, "COLUMNS": self.columns, "ACC": acc, "num_warps": self.warps}


def tile_for(row_length: int, backward: bool = False) -> Tile:
    """The tile of a row kernel: 16 elements a thread (8 in a backward pass) while 16 warps suffice.

    That is one 16-byte access of two tensors of bfloat16; a backward pass holds four tiles, and with
    16 elements of each it takes 128 to 174 registers on sm_90. Short rows share a program: query-key
    norms have rows of 64 to 256, and millions of them. At most 16 warps, since AMD's have 64 lanes
    and a program at most 1024.
    """
    columns = triton.next_power_of_2(row_length)
    per_warp = 256 if backward else 512
    rows = max(1, 4 * per_warp // columns)
    return Tile(rows, columns, min(16, max(4, rows * columns // per_warp)))


def partial_programs(tile: Tile, n_rows: int) -> int:
    """Programs of a backward pass that writes one partial weight gradient each.

    A constant of the shape, not of the device, so that the order of summation, hence every bit of
    the result, is the same everywhere. At 256 the partials of [8192, 4096] bfloat16 are 2% of its
    traffic and still two programs for each multiprocessor of an sm_90.
    """
    most = min(2048, max(256, 2**20 // tile.columns))
    return min(most, triton.cdiv(n_rows, tile.rows))


def as_rows(x: Tensor) -> Tensor:
    """`x` as `[rows, d]` with unit stride in a row; copies only if no such view exists.

    Slices of a fused projection and expanded rows (stride 0) are views.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def row_stride(rows: Tensor | None) -> int:
    """Elements from one row to the next; 0 for an operand that is not there."""
    return 0 if rows is None else rows.stride(0)


def elementwise_strides(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Strides of the result of `a + b`: what a caller that views the result relies on."""
    if a.is_contiguous() and b.is_contiguous():
        return a.stride()
    first, second = (torch.empty_strided(x.shape, x.stride(), device="meta") for x in (a, b))
    return torch.empty_like(first + second).stride()


def restride(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The contiguous `x` with other strides: itself if they are the same."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, **options: Any) -> None:
    """Run `programs` programs of a kernel on the device of `on`.

    Raises:
        RuntimeError: `on` is a CPU tensor and the kernel was not made for the interpreter.
    """
    guard: AbstractContextManager[Any] = nullcontext()
    if on.device.type == "cpu":
        if isinstance(kernel, JITFunction):
            raise RuntimeError(
                f"{kernel.__name__}: expected a GPU tensor, got one on cpu. To run in Triton's interpreter, "
                "set TRITON_INTERPRET=1 before effopt.backends.triton is imported"
            )
    else:
        guard = torch.accelerator.device_index(on.device.index)
    with guard:
        # Triton 3.9 warns if the caller leaves this open, since its default changes in 3.10.
        kernel[(programs,)](*args, **{"enable_fp_fusion": True, **options})


def multiplied_in(x: Tensor) -> Any:
    """Dtype of the operands of `tl.dot`. The interpreter, of Triton 3.9, multiplies the bits of bfloat16."""
    if x.device.type == "cpu":
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x.dtype]


def check_floating(**tensors: Tensor | None) -> None:
    """Every tensor has a dtype that the kernels read, and all are on one device."""
    first: tuple[str, Tensor] | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {DTYPES}, got {x.dtype}")
        first = first or (name, x)
        if x.device != first[1].device:
            raise ValueError(f"{name}: expected device {first[1].device} like {first[0]}, got {x.device}")


def check_alike(name: str, x: Tensor, like: Tensor) -> None:
    """`x` has the shape and dtype of `like`."""
    if x.shape != like.shape or x.dtype != like.dtype:
        expected = f"{list(like.shape)} {like.dtype}"
        raise ValueError(f"{name}: expected {expected}, got {list(x.shape)} {x.dtype}")


def check_row(x: Tensor, **vectors: Tensor | None) -> None:
    """`x` has a last dimension that fits a program, and each vector is `[d]` of it."""
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    reason = row_refusal("x", x)
    if reason is not None:
        raise ValueError(reason)
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (x.shape[-1],):
            raise ValueError(f"{name}: expected shape [{x.shape[-1]}], got {list(vector.shape)}")


def row_refusal(name: str, x: Tensor) -> str | None:
    """Why the last dimension of `x` does not fit a program, or None."""
    if x.dim() == 0:
        return f"{name} is a scalar, and the kernel works on rows"
    length = x.shape[-1]
    if not isinstance(length, int):
        return f"the row length of {name} is symbolic ({length}), and the tile is chosen from a number"
    longest = MAX_ROW_FLOAT64 if x.dtype == torch.float64 else MAX_ROW
    if length > longest:
        return f"{name} has rows of {length} {x.dtype}, and one program holds at most {longest}"
    return None


def refusal(target: Target, tensors: Mapping[str, Tensor | None]) -> str | None:
    """Why no kernel here takes these tensors on this target, or None."""
    if not target.has_triton:
        name = target.device_type
        return f"target {name} has no compiled Triton; the reference is inlined and Inductor fuses it"
    arch = re.fullmatch(r"sm_(\d+)", target.arch)
    if arch and int(arch.group(1)) < 80:
        return f"target {target.arch} is older than sm_80, which the kernels are compiled and tested for"
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, and the kernel reads float16, bfloat16, float32 and float64"
        if any(statically_known_true(size == 0) for size in x.shape):
            return f"{name} is empty ({list(x.shape)}), and there is nothing to launch"
    return None


def alike_refusal(name: str, x: Tensor | None, other_name: str, other: Tensor) -> str | None:
    """Why `x` does not have the shape and dtype of `other`, or None. Adds no guard on symbols."""
    if x is None:
        return None
    same = len(x.shape) == len(other.shape) and all(
        statically_known_true(a == b) for a, b in zip(x.shape, other.shape, strict=True)
    )
    if same and x.dtype == other.dtype:
        return None
    got, expected = f"{list(x.shape)} {x.dtype}", f"{list(other.shape)} {other.dtype}"
    return f"{name} is {got}, and the kernel wants that of {other_name}, {expected}"


def vector_refusal(name: str, vector: Tensor | None, x: Tensor) -> str | None:
    """Why `vector` is not one value for each column of `x`, or None."""
    if vector is None or (vector.dim() == 1 and statically_known_true(vector.shape[0] == x.shape[-1])):
        return None
    return f"{name} has shape {list(vector.shape)}, and the kernel wants [{x.shape[-1]}]"


def norm_outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of a norm: its result and the total of x and the residual, unwritten; and the residual as rows.

    Raises:
        ValueError: the residual does not have the shape and dtype of `x`.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if residual is None:
        return out, None, None
    check_alike("residual", residual, x)
    return out, torch.empty_like(out), as_rows(residual) if residual.numel() else residual


def norm_refusal(target: Target, x: Tensor, residual: Tensor | None, **vectors: Tensor | None) -> str | None:
    """Why no norm here takes `x`, after the addition of a residual or alone, or None."""
    return (
        refusal(target, {"x": x, "residual": residual, **vectors})
        or alike_refusal("residual", residual, "x", x)
        or row_refusal("x", x)
        or next(filter(None, (vector_refusal(name, vector, x) for name, vector in vectors.items())), None)
    )


def roofline(op: Op) -> Callable[[Target, Operands, Any], float]:
    """The cost of a kernel that moves each byte of `op` once: bandwidth time and one launch."""

    def cost(target: Target, operands: Operands, result: Any) -> float:
        return op.bytes_moved(operands, result) / target.bytes_per_s + LAUNCH_S

    return cost
