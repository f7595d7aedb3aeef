"""The lowering that always works: the op's own reference, inlined for Inductor to fuse."""

from __future__ import annotations

from typing import Any

from effopt.backends.base import Lowering
from effopt.graph.ops.base import Op, Operands
from effopt.target import Target


def _supports(_: Target, __: Operands) -> None:
    return None


def reference_lowering(op: Op) -> Lowering:
    """The reference of `op` as a lowering. Costed at the roofline of its operands, times two.

    The factor says that a fused reference still spills what a written kernel keeps in registers;
    it only ranks the reference behind a kernel that supports the operands.
    """

    def cost(target: Target, operands: Operands, result: Any) -> float:
        moved, work = op.bytes_moved(operands, result), op.flops(operands, result)
        moved += op.reference_bytes(operands, result) if op.reference_bytes else 0.0
        return 2.0 * max(moved / target.bytes_per_s, work / target.flops_per_s)

    return Lowering(op, "reference", op.overload, _supports, cost)
