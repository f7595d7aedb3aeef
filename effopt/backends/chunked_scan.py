"""The selective scan on a CPU: steps in chunks that stay in cache, one call a step.

Decays and inputs of a chunk of steps are formed together, `[steps, b, d, n]`; then each step is one
`addcmul` into the place of its input, which becomes its state; then all states of the chunk are read out
together. So the state goes from step to step as in the definition: no product of decays is formed, and
nothing is divided by one. At run time it is one call, so that the compiled graph does not grow with the
sequence.

Backward: the state before each chunk is kept. A chunk's states are computed anew from it, last chunk first;
with g_t the gradient of the state after step t, `g_t = dy_t * c_t + decay_(t+1) * g_(t+1)` is the same loop
the other way, and the gradients of the operands are sums of products over whole chunks.

Source: Gu & Dao 2023, arXiv:2312.00752, section 3.3.2 (states recomputed in the backward pass).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.graph.ops.selective_scan import check_shapes
from effopt.target import Target

_CHUNK_BYTES = 2**19
"""Of the decays of a chunk. They and the states are 1 MiB together: half of a second-level cache of 2 MiB."""
_MOST_STEPS = 64  # states are kept once a chunk; fewer steps keep more of them


def _steps(state: Tensor) -> int:
    """Steps of a chunk."""
    return max(1, min(_MOST_STEPS, _CHUNK_BYTES // max(1, state.numel() * state.itemsize)))


def _over_time(x: Tensor, steps: slice, accumulate: torch.dtype) -> Tensor:
    """`[b, k, t]` -> `[steps, b, k]`, contiguous."""
    return x[:, :, steps].permute(2, 0, 1).to(accumulate).contiguous()


class _Chunk:
    """Some steps of a call: operands with time first, and decays and states of `[steps, b, d, n]`."""

    def __init__(
        self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, steps: slice, state: Tensor
    ) -> None:
        self.u, self.delta, self.b, self.c = (_over_time(x, steps, state.dtype) for x in (u, delta, b, c))
        self.decays = torch.exp_(self.delta.unsqueeze(-1) * a)
        self.states = (self.delta * self.u).unsqueeze(-1) * self.b.unsqueeze(-2)
        for decay, place in zip(self.decays.unbind(), self.states.unbind(), strict=True):
            state = place.addcmul_(decay, state)

    def read_out(self) -> Tensor:
        """`[steps, b, d]`."""
        return torch.matmul(self.states, self.c.unsqueeze(-1)).squeeze(-1)


def _chunks(t: int, steps: int) -> list[slice]:
    return [slice(first, min(t, first + steps)) for first in range(0, t, steps)]


@torch.library.custom_op(
    "effopt_cpu::selective_scan",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? start) "
    "-> (Tensor, Tensor, Tensor)",
)
def _scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the last state, and the state before each chunk."""
    check_shapes(u, delta, a, b, c, start)
    batch, d, t = u.shape
    accumulate = torch.promote_types(u.dtype, torch.float32)
    rates = a.to(accumulate)
    size = (batch, d, a.shape[1])
    state = u.new_zeros(size, dtype=accumulate) if start is None else start.to(accumulate)
    chunks = _chunks(t, _steps(state))
    y, kept = u.new_empty(u.shape), state.new_empty((len(chunks), *size))
    for place, steps in zip(kept.unbind(), chunks, strict=True):
        place.copy_(state)
        chunk = _Chunk(u, delta, rates, b, c, steps, state)
        y[:, :, steps] = chunk.read_out().permute(1, 2, 0)
        state = chunk.states[-1]
    return y, state.clone(memory_format=torch.contiguous_format), kept


@_scan.register_fake
def _(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, last = ops.selective_scan.fake(u, delta, a, b, c, start)
    steps = _steps(last)
    return y, last, last.new_empty(((u.shape[2] + steps - 1) // steps, *last.shape))


@torch.library.custom_op(
    "effopt_cpu::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor? grad_y, Tensor? grad_last, Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, "
    "Tensor kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan_backward(
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, a, b, c, start), in the dtype of accumulation."""
    accumulate, rates = kept.dtype, a.to(kept.dtype)
    du, ddelta, db, dc = (torch.empty(x.shape, dtype=accumulate) for x in (u, delta, b, c))
    da = torch.zeros(a.shape, dtype=accumulate)
    carried = torch.zeros(kept.shape[1:], dtype=accumulate) if grad_last is None else grad_last.clone()
    chunks = _chunks(u.shape[2], _steps(carried))
    for before, steps in zip(kept.unbind()[::-1], chunks[::-1], strict=True):
        chunk = _Chunk(u, delta, rates, b, c, steps, before)
        grad = torch.zeros_like(chunk.states)
        if grad_y is not None:
            dy = _over_time(grad_y, steps, accumulate)
            dc[:, :, steps] = torch.matmul(dy.unsqueeze(-2), chunk.states).squeeze(-2).permute(1, 2, 0)
            torch.mul(dy.unsqueeze(-1), chunk.c.unsqueeze(-2), out=grad)
        else:
            dc[:, :, steps] = 0
        for place, decay in zip(grad.unbind()[::-1], chunk.decays.unbind()[::-1], strict=True):
            carried = place.add_(carried) * decay
        previous = torch.cat([before.unsqueeze(0), chunk.states[:-1]])
        into = torch.matmul(grad, chunk.b.unsqueeze(-1)).squeeze(-1)
        du[:, :, steps] = (into * chunk.delta).permute(1, 2, 0)
        db[:, :, steps] = (
            torch.matmul((chunk.delta * chunk.u).unsqueeze(-2), grad).squeeze(-2).permute(1, 2, 0)
        )
        through = grad.mul_(previous).mul_(chunk.decays)
        da += torch.einsum("tbdn,tbd->dn", through, chunk.delta)
        ddelta[:, :, steps] = (torch.einsum("tbdn,dn->tbd", through, rates) + into * chunk.u).permute(1, 2, 0)
    return du, ddelta, da, db, dc, carried.clone()


@_scan_backward.register_fake
def _(
    grad_y: Any, grad_last: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, kept: Tensor
) -> tuple[Tensor, ...]:
    return *(kept.new_empty(x.shape) for x in (u, delta, a, b, c)), kept.new_empty(kept.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, start = inputs
    ctx.start_dtype = None if start is None else start.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, output[2])


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Any) -> tuple[Any, ...]:
    operands = ctx.saved_tensors[:5]
    if grad_y is None and grad_last is None:
        return (None,) * 6
    *found, dstart = _scan_backward(grad_y, grad_last, *ctx.saved_tensors)
    *gradients, dc = (g.to(x.dtype) for g, x in zip(found, operands, strict=True))
    return (
        *gradients,
        None if grad_y is None else dc,
        None if ctx.start_dtype is None else dstart.to(ctx.start_dtype),
    )


_scan.register_autograd(_differentiate, setup_context=_save)


def chunked_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`effopt::selective_scan`; shapes and dtypes as there."""
    y, last, _ = _scan(u, delta, a, b, c, start)
    return y, last


def _supports(target: Target, operands: Operands) -> str | None:
    if target.device_type != "cpu":
        return f"loops over steps in Python, and on {target.device_type} each call is a launch"
    for name in ("u", "a"):
        if any(not isinstance(size, int) for size in operands[name].shape):
            return f"{name} has symbolic sizes, and chunks are chosen from numbers"
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    op = ops.selective_scan
    return max(
        op.bytes_moved(operands, result) / target.bytes_per_s, op.flops(operands, result) / target.flops_per_s
    )


LOWERINGS = (Lowering(ops.selective_scan, "chunks", chunked_scan, _supports, _cost),)
