"""How far a result may be from float64, by dtype. One table, for every comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GRADIENT_FACTOR = 10.0  # a backward pass rounds about twice as often, and sums over rows as well as columns


@dataclass(frozen=True)
class Tolerance:
    """`|result - reference| <= atol + rtol * |reference|`, the reference taken in float64.

    Checks of rewrites, which do not know the scale of their values, take `rtol` of the largest magnitude.
    """

    rtol: float
    atol: float
    reason: str


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(
        1e-10, 1e-10, "sums of thousands of terms, each rounded at 1.1e-16, in another order"
    ),
    torch.float32: Tolerance(
        2e-5, 1e-5, "the same at 6e-8, and hardware exp and rsqrt of two units in the last place"
    ),
    torch.bfloat16: Tolerance(
        1.6e-2, 1.6e-2, "four roundings of 2^-8 where a reference rounds between its steps"
    ),
    torch.float16: Tolerance(
        2e-3, 2e-3, "four roundings of 2^-11 where a reference rounds between its steps"
    ),
    torch.complex64: Tolerance(2e-5, 1e-5, "each part is a float32"),
    torch.complex128: Tolerance(1e-10, 1e-10, "each part is a float64"),
}


def tolerance_of(*dtypes: torch.dtype) -> Tolerance:
    """The row of the least precise of `dtypes`; that of float64 if none is floating."""
    rows = [TOLERANCES[d] for d in dtypes if d in TOLERANCES]
    return max(rows, key=lambda row: row.rtol, default=TOLERANCES[torch.float64])
