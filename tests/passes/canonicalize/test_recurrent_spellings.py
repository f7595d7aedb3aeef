"""How a loop over time spells its step, its first step and its read-outs: each is exact, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.canonicalize.test_recognize_recurrent_attention import (
    NAME,
    B,
    Body,
    D,
    H,
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


def compare(loop: Body, calls: int, pipeline: str = NAME) -> None:
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
    compare(STEPS[name], 1)


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


def step(s: Any, k: Tensor, v: Tensor, g: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The state decayed by gates of channels, and what is added to it."""
    return s * g[:, :, t, :, None].sigmoid(), k[:, :, t, :, None] * v[:, :, t, None]


def ahead(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Read before its update: a token sees those ahead of it alone."""
    out = []
    for t in range(T):
        out.append(weighed(q, s, t))
        kept, kv = step(s, k, v, g, t)
        s = kept + kv
    return torch.stack(out, 2), s


def ahead_backwards(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """From zeros, by a constant for each head, with no use of the last state."""
    s, out, rates = torch.zeros_like(s), torch.empty_like(v), torch.linspace(0.5, 1, H, dtype=v.dtype)
    for t in reversed(range(T)):
        out[:, :, t] = weighed(q, s, t)
        s = s * rates[:, None, None] + step(s, k, v, g, t)[1]
    return (out,)


def bonus(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """As RWKV-5 and -6 read: with a learned weight for the token's own key; the last state is not wanted."""
    out = []
    for t in range(T):
        kept, kv = step(s, k, v, g, t)
        out.append(0.5 * q[:, :, t, None] @ (s + g[0, :, 0, :, None].exp() * kv))
        s = kept + kv
    return (torch.cat(out, 2),)


def decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Read between its decay and its update."""
    out = []
    for t in range(T):
        kept, kv = step(s, k, v, g, t)
        out.append(weighed(q, kept + kv * g[0, 0, 0, :, None], t))
        s = kept + kv
    return torch.stack(out, 1), s


def turned(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Value by key, without batch entries, read before its update."""
    s, out = s[0].mT, []
    for t in range(T):
        out.append(torch.einsum("hed,hd->he", s, q[0, :, t]))
        s = s * g[0, :, t, :1, None].exp() + torch.einsum("hd,he->hed", k[0, :, t], v[0, :, t])
    return torch.stack(out), s


def two_queries(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    one, other = [], []
    for t in range(T):
        kept, kv = step(s, k, v, g, t)
        s = kept + kv
        one.append(weighed(q, s, t))
        other.append(k[:, :, t, None] @ s)
    return torch.stack(one, 2), torch.cat(other, 2), s


def before_and_after(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    one, other = [], []
    for t in range(T):
        one.append(weighed(q, s, t))
        kept, kv = step(s, k, v, g, t)
        s = kept + kv
        other.append(weighed(q, s, t))
    return torch.stack(one, 2), torch.stack(other), s


def both_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """By a query of keys, and by one of values."""
    s, one, other = torch.zeros_like(s), [], []
    for t in range(T):
        s = s * 0.9 + step(s, k, v, g, t)[1]
        one.append(weighed(q, s, t))
        other.append((s * v[:, :, t, None].cos()).sum(-1))
    return torch.stack(one, 2), torch.stack(other, 2)


READS = {
    ahead: 1, ahead_backwards: 1, bonus: 1, decayed: 1, turned: 1, two_queries: 2, before_and_after: 2,
    both_channels: 2,
}  # fmt: skip


@pytest.mark.parametrize("loop", READS)
def test_read_outs(loop: Body) -> None:
    compare(loop, READS[loop])


def vectors(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Normalisers with a gate of tokens, and sums in three spellings."""
    z, sums = k.new_zeros(B, H, D), [[], [], []]  # type: ignore[var-annotated]
    for t in range(T):
        z = z * g[:, :, t, :1].sigmoid() + k[:, :, t]
        sums[0].append((q[:, :, t] * z).sum(-1, keepdim=True))
        sums[1].append(torch.einsum("bhd,bhd->bh", q[:, :, t].exp(), z))
        sums[2].append(q[:, :, t, None] @ z[..., None])
    return torch.cat(sums[0], -1), torch.stack(sums[1]), torch.cat(sums[2], 2), z


def one_vector(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Of one head, from its first key, read before its update too."""
    z, out, ahead = k[0, 0, 0], [], []
    for t in range(T):
        z = torch.add(z, k[0, 0, t], alpha=1) if t else z
        out.append(z @ q[0, 0, t])
    y = s[0, 0, :, 0]
    for t in range(T):
        ahead.append(q[0, 0, t] @ (y + 2 * k[0, 0, t]))
        y = y * 0.5 + k[0, 0, t]
    return torch.stack(out), z, torch.stack(ahead), y


@pytest.mark.parametrize(("loop", "calls"), [(vectors, 3), (one_vector, 2)])
def test_a_state_that_is_a_vector_for_each_head(loop: Body, calls: int) -> None:
    compare(loop, calls)


@pytest.mark.parametrize(
    "read", [ahead, bonus, spelled(lambda s, k, v, g: s * g + k * v, lambda k, v: k * v)]
)
def test_what_is_not_finite_spoils_no_earlier_token(read: Body) -> None:
    """A key of one token, and the gate that a first step does not read."""
    given = inputs()
    given[1][:, :, 3] = torch.nan
    given[3][:, :, 0] = given[3][:, :, 0] if read in (ahead, bonus) else torch.nan
    with torch.no_grad():
        got, report = run_compiled(read, *given, pipeline=NAME)
        want = read(*given)
    assert report.ops["linear_attention"] == 1
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_products_of_widened_factors_are_not_rounded() -> None:
    """Keys and weights in 16 bits, widened before the loop: their products have the digits that they had."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
        q, k, v, g = (x.float() for x in (q, k, v, g))
        s, out = s.float(), []
        for t in range(T):
            s = 0.9 * s + (k[:, :, t] * g[:, :, t])[..., None] * torch.exp(v[:, :, t, None])
            out.append(weighed(q, s, t))
        return torch.stack(out, 2)

    given = inputs(torch.bfloat16)
    with torch.no_grad():
        got, report = run_compiled(loop, *given, pipeline=NAME)
    assert report.ops["linear_attention"] == 1
    want = loop(*(x.float() for x in given))
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()
