"""How a loop over time spells its step, and its first step: each is exact, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.canonicalize.test_recognize_recurrent_attention import (
    NAME,
    Body,
    Outs,
    T,
    inputs,
    total,
)
from tests.passes.conftest import run_compiled

Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The state after a step, of the one before it, and of the step's key `[.., d, 1]`, value and gate."""


def spelled(
    update: Update, first: Callable[[Tensor, Tensor], Tensor] | None = None, rows: bool = False
) -> Body:
    """A loop from a given state, or from what `first` makes of the first key and value."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
        if rows:
            q, k, v, g, s = (x.flatten(0, 1) for x in (q, k, v, g, s))
        out = []
        for t in range(T):
            key, value, gate = k[..., t, :, None], v[..., t, None, :], g[..., t, :, None]
            s = first(key, value) if first and not t else update(s, key, value, gate.sigmoid())
            out.append(q[..., t, None, :] @ s)
        return torch.cat(out, -2), s

    return loop


def single(update: Callable[..., Tensor]) -> Body:
    """A loop of one head."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
        s, out = s[0, 0], []
        for t in range(T):
            s = update(s, k[0, 0, t], v[0, 0, t])
            out.append(q[0, 0, t] @ s)
        return torch.stack(out), s

    return loop


def halved(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Decayed behind its addition; the read-out is of what the next step finds."""
    s, out = torch.zeros_like(s), []
    for t in range(T):
        s = (s + k[:, :, t, :, None] * v[:, :, t, None]) / 2
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return (torch.stack(out, 2),)


def added_to(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    s, out = torch.zeros_like(s), []
    for t in range(T):
        s += k[:, :, t, :, None] * v[:, :, t, None]
        out.append(q[:, :, t, None] @ s)
    return torch.cat(out, 2), s


def in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    s, out = torch.zeros_like(s), []
    for t in range(T):
        s.mul_(g[:, :, t, :, None].sigmoid()).add_(k[:, :, t, :, None] * v[:, :, t, None])
        out.append(q[:, :, t, None] @ s)
    return (torch.cat(out, 2),)


STEPS: dict[str, Body] = {
    "divided by a number": spelled(lambda s, k, v, g: s / 2 + k * v),
    "a gate divided by a number": spelled(lambda s, k, v, g: s * (g / 2) + k * v),
    "methods": spelled(lambda s, k, v, g: s.mul(g).add(k * v)),
    "subtracted": spelled(lambda s, k, v, g: s * g - k * v),
    "added with a factor": spelled(lambda s, k, v, g: torch.add(s * g, k * v, alpha=-0.3)),
    "addcmul": spelled(lambda s, k, v, g: torch.addcmul(s, k, v)),
    "addcmul of a decayed state": spelled(lambda s, k, v, g: torch.addcmul(s * g, k, v, value=2)),
    "addcmul of the gate": spelled(lambda s, k, v, g: torch.addcmul(k * v, s, g, value=0.5)),
    "lerp": spelled(lambda s, k, v, g: torch.lerp(s, k * v, g)),
    "lerp from the product": spelled(lambda s, k, v, g: torch.lerp(k * v, s, g)),
    "lerp by a number": spelled(lambda s, k, v, g: torch.lerp(s, k * v, 0.1)),
    "lerp by the rest": spelled(lambda s, k, v, g: torch.lerp(s, k * v, 1 - g)),
    "addcdiv": spelled(lambda s, k, v, g: torch.addcdiv(s * g, k * v, 1 + g)),
    "addcdiv with a factor": spelled(lambda s, k, v, g: torch.addcdiv(s, k * v, 1 + g, value=-2)),
    "a quotient": spelled(lambda s, k, v, g: s * g + k * v / (1 + g)),
    "a quotient by a number": spelled(lambda s, k, v, g: s * g + k * v / 3),
    "addcdiv of the state": spelled(lambda s, k, v, g: torch.addcdiv(k * v, s, g.exp())),
    "divided by an exponential": spelled(lambda s, k, v, g: s / g.exp() + k * v),
    "a sum of Python's": spelled(lambda s, k, v, g: sum((s * g, k * v))),
    "a sum that begins with the product": spelled(lambda s, k, v, g: sum([k * v, s * g])),
    "a sum without a decay": spelled(lambda s, k, v, g: sum((s, k * v))),
    "a copy of the state": spelled(lambda s, k, v, g: s.clone() * g + k * v),
    "baddbmm": spelled(lambda s, k, v, g: torch.baddbmm(s, k, v), rows=True),
    "baddbmm with factors": spelled(
        lambda s, k, v, g: torch.baddbmm(s * g, k, v, beta=0.9, alpha=0.1), rows=True
    ),
    "addmm": single(lambda s, k, v: torch.addmm(s, k[:, None], v[None])),
    "addr": single(lambda s, k, v: torch.addr(s, k, v, beta=0.9)),
    "halved": halved,
    "a first step without decay": spelled(lambda s, k, v, g: s * g + k * v, lambda k, v: k * v),
    "a first step to add to": spelled(lambda s, k, v, g: s + k * v, lambda k, v: k * v),
    "a first bmm": spelled(lambda s, k, v, g: torch.baddbmm(s, k, v), torch.bmm, rows=True),
}  # fmt: skip


def assert_becomes_calls(loop: Body, calls: int, pipeline: str = NAME) -> None:
    """In float64, as exact as sums in another order are, and with the loop's gradients."""
    given = [x.requires_grad_() for x in inputs(torch.float64)]
    got, report = run_compiled(loop, *given, pipeline=pipeline)
    assert report.ops["linear_attention"] == calls, [r.reason for r in report.rejected]
    assert not report.faults
    assert not report.rejected
    want = loop(*given)
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride()
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()
    found = [torch.autograd.grad(total(y), given, allow_unused=True) for y in (got, want)]
    for one, other in zip(*found, strict=True):
        one, other = (torch.zeros(()) if x is None else x for x in (one, other))
        assert (one - other).abs().max() <= 1e-13 * other.abs().max()


@pytest.mark.parametrize("name", STEPS)
def test_a_step(name: str) -> None:
    assert_becomes_calls(STEPS[name], 1)


@pytest.mark.parametrize("loop", [added_to, in_place])
def test_a_step_in_place(loop: Body) -> None:
    """The loop itself has no gradients then."""
    given = inputs(torch.float64)
    with torch.no_grad():
        got, report = run_compiled(loop, *given, pipeline=NAME)
        want = loop(*given)
    assert report.ops["linear_attention"] == 1
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()


def weighed(q: Tensor, s: Tensor, t: int) -> Tensor:
    return (q[:, :, t, :, None] * s).sum(-2)
