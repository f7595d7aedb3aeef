"""A diagonal state space whose steps and projections depend on the input.

    h_t = exp(delta_t * a) * h_(t-1) + delta_t * u_t * b_t
    y_t = sum over n of c_t * h_t

Source: Gu & Dao 2023, arXiv:2312.00752, section 3.3 and algorithm 2.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.ops.base import Operands, Sample, hint, op


def _work(operands: Operands) -> float:
    """Updates of one number of the state."""
    sizes = (*operands["u"].shape, operands["a"].shape[-1])
    return float(math.prod(map(hint, sizes)))


def _flops(operands: Operands, _: Any) -> float:
    """The exponent counts as ten: two products, the update, the read-out."""
    return 17.0 * _work(operands)


def _reference_bytes(operands: Operands, _: Any) -> float:
    """Decays and inputs of all steps in float32, written and read, and the state once a step."""
    return 24.0 * _work(operands)


def check_shapes(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Optional[Tensor]) -> None:
    """Raises ValueError where a size is known not to be what `u` and `a` make it. Adds no guard."""
    (batch, d, t), n = u.shape, a.shape[-1]
    wanted = [
        ("delta", delta, (batch, d, t)),
        ("a", a, (d, n)),
        ("b", b, (batch, n, t)),
        ("c", c, (batch, n, t)),
    ]
    wanted += [] if start is None else [("start", start, (batch, d, n))]
    for name, x, shape in wanted:
        if x.dim() != len(shape) or any(map(statically_known_true, map(operator.ne, x.shape, shape))):
            raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")


def _fake(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    check_shapes(u, delta, a, b, c, start)
    accumulate = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(u.shape), u.new_empty((*u.shape[:2], a.shape[1]), dtype=accumulate)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterable[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    for b, d, n, t in ((1, 3, 4, 1), (2, 5, 3, 63), (1, 4, 16, 100)):
        delta = torch.nn.functional.softplus(draw(b, d, t) - 1)
        given = draw(b, d, t), delta, -draw(d, n).exp(), draw(b, n, t), draw(b, n, t)
        yield Sample(given, {})
        yield Sample((*given, draw(b, d, n)), {})


@op(flops=_flops, samples=_samples, fake=_fake, reference_bytes=_reference_bytes)
def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """The scan of `u` over `t`.

    Args:
        u: `[b, d, t]`, one channel a row: the layout in which Mamba's convolution leaves it.
        delta: `[b, d, t]`, the length of each step.
        a: `[d, n]`, negative where the state is to decay.
        b: `[b, n, t]`, what of an input goes into each number of the state.
        c: `[b, n, t]`, what of the state goes into the output.
        start: `[b, d, n]`, the state before the first step; zeros if None.

    Returns:
        `y`, `[b, d, t]`, dtype of `u`, and the state after the last step, `[b, d, n]`, in the dtype of
        accumulation: float32 or wider. Both contiguous. All arithmetic is done in that dtype.
    """
    accumulate = torch.promote_types(u.dtype, torch.float32)
    x, step, rate, into, out = (v.to(accumulate) for v in (u, delta, a, b, c))
    size = (*u.shape[:2], a.shape[1])
    state = torch.zeros(size, dtype=accumulate, device=u.device) if start is None else start.to(accumulate)
    outputs = []
    for i in range(u.shape[2]):
        length = step[:, :, i, None]
        state = torch.exp(length * rate) * state + length * x[:, :, i, None] * into[:, None, :, i]
        outputs.append((state * out[:, None, :, i]).sum(-1))
    y = torch.stack(outputs, -1).to(u.dtype) if outputs else u.new_empty(u.shape)
    return y, state.clone(memory_format=torch.contiguous_format)
