"""What a loop over time reads of its state in each step, and of a normaliser's: exact, with gradients."""

from __future__ import annotations

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
)
from tests.passes.canonicalize.test_recurrent_spellings import assert_becomes_calls, spelled, weighed
from tests.passes.conftest import run_compiled


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
    assert_becomes_calls(loop, READS[loop])


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
    assert_becomes_calls(loop, calls)


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
