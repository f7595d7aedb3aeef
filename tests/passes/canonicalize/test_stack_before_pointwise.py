"""What a step does to its read-out moves behind the loop, exactly; loop and normaliser become calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.canonicalize.test_recognize_recurrent_attention import Body, D, E, Outs, T, inputs
from tests.passes.canonicalize.test_recurrent_spellings import assert_becomes_calls, weighed
from tests.passes.conftest import run_compiled

NAME = "stack-before-pointwise"
BOTH = f"{NAME},recognize-recurrent-attention"
Work = Callable[..., Tensor]


def normalised(work: Work, dim: int = 2, join: Any = torch.stack) -> Body:
    """The loop of Katharopoulos et al., with gates of tokens, by what a step makes of its states."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        s, z, out = torch.zeros_like(s), torch.zeros_like(k[:, :, 0]), []
        for t in range(T):
            gate = g[:, :, t, :1].sigmoid()
            s = s * gate[..., None] + k[:, :, t, :, None] * v[:, :, t, None]
            z = z * gate + k[:, :, t]
            out.append(work(q, s, z, v, t))
        return (join(out, dim),)

    return loop


def mass(q: Tensor, z: Tensor, t: int) -> Tensor:
    return (q[:, :, t] * z).sum(-1, keepdim=True)


def from_the_first_key(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Both states are the first token's own; written into a tensor from the last token back."""
    z, out = torch.empty(0), torch.empty_like(v)
    for t in reversed(range(T)):
        is_first, kv = t == T - 1, k[:, :, t, :, None] * v[:, :, t, None]
        s, z = (kv, k[:, :, t]) if is_first else (s + kv, z + k[:, :, t])
        out[:, :, t] = weighed(q, s, t) / (1 + mass(q, z, t).square())
    return out, s, z


def turned(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """From the last token back, collected in that order, rows with the axis of time."""
    out = []
    for t in reversed(range(T)):
        s = 0.9 * s + k[:, :, t : t + 1].mT @ v[:, :, t : t + 1]
        out.append((q[:, :, t : t + 1] @ s) * F.silu(v[:, :, t : t + 1]))
    return torch.cat(out, 2), s


def ahead(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """The bonus for a token's own key is added to what it read before its update."""
    out = []
    for t in range(T):
        own = (q[:, :, t] * g[0, 0, 0].exp() * k[:, :, t]).sum(-1, keepdim=True) * v[:, :, t]
        out.append(weighed(q, s, t) + own)
        s = s * g[:, :, t, :, None].sigmoid() + k[:, :, t, :, None] * v[:, :, t, None]
    return torch.stack(out, 2), s


def two_queries(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """The difference of two read-outs of one state, beside one of them."""
    one, other = [], []
    for t in range(T):
        s = s * 0.5 + k[:, :, t, :, None] * v[:, :, t, None]
        first = weighed(q, s, t)
        one.append(first)
        other.append(first - 0.5 * weighed(g, s, t))
    return torch.stack(one, 2), torch.stack(other, 2)


LOOPS: dict[str, tuple[Body, int]] = {
    "an epsilon": (normalised(lambda q, s, z, v, t: weighed(q, s, t) / (mass(q, z, t) + 1e-6)), 2),
    "a clamp, by matmuls": (
        normalised(
            lambda q, s, z, v, t: (
                (q[:, :, t, None] @ s) / (q[:, :, t, None] @ z[..., None]).clamp(min=0.1)
            ).squeeze(2),
            dim=0,
        ),
        2,
    ),
    "by einsums, a magnitude of 1 or more": (
        normalised(
            lambda q, s, z, v, t: (
                torch.einsum("bhd,bhde->bhe", q[:, :, t], s)
                / torch.einsum("bhd,bhd->bh", q[:, :, t], z).abs().unsqueeze(-1).clamp_min(1.0)
            ),
            dim=1,
        ),
        2,
    ),
    "a gate": (normalised(lambda q, s, z, v, t: F.silu(v[:, :, t]) * weighed(q, s, t) / 2), 1),
    "an activation of rows": (
        normalised(lambda q, s, z, v, t: torch.tanh(q[:, :, t, None] @ s), join=torch.cat),
        1,
    ),
    "a gate that is no pointwise work": (
        normalised(lambda q, s, z, v, t: weighed(q, s, t) * v[:, :, t].softmax(-1)),
        1,
    ),
    "where a value is positive": (
        normalised(lambda q, s, z, v, t: torch.where(v[:, :, t] > 0, weighed(q, s, t), 0.0)),
        1,
    ),
    "from the first key": (from_the_first_key, 2),
    "turned": (turned, 1),
    "a bonus behind the read-out": (ahead, 1),
    "two queries": (two_queries, 3),
}


@pytest.mark.parametrize("name", LOOPS)
def test_work_of_a_step_moves_and_the_loop_is_a_call(name: str) -> None:
    loop, calls = LOOPS[name]
    assert_becomes_calls(loop, calls, BOTH)


def test_as_a_user_compiles_it() -> None:
    """The whole pipeline takes both states, and tells of none."""
    loop = normalised(lambda q, s, z, v, t: weighed(q, s, t) / (mass(q, z, t) + 1e-6) * v[:, :, t].sigmoid())
    given = inputs()
    with torch.no_grad():
        (got,), report = run_compiled(loop, *given)
    (want,) = loop(*(x.double() for x in given))
    assert report.ops["linear_attention"] == 2
    assert report.counts[NAME] == 1
    assert not [r for r in report.rejected if r.pass_name in (*BOTH.split(","), "recognize-selective-scan")]
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()


def test_rounding_of_a_step_stays() -> None:
    """Results are rounded as they were, and widened again, behind the loop."""
    loop = normalised(lambda q, s, z, v, t: (weighed(q, s, t).bfloat16() * v[:, :, t].bfloat16()).float())
    given = inputs()
    with torch.no_grad():
        (got,), report = run_compiled(loop, *given, pipeline=BOTH)
    assert report.ops["linear_attention"] == 1, [r.reason for r in report.rejected]
    assert torch.equal(got, got.bfloat16().float())
    torch.testing.assert_close(got, loop(*given)[0], rtol=2**-7, atol=0.0)


def test_a_widened_operand_is_computed_with_as_it_was() -> None:
    """A gate in 16 bits, widened in each step: its sigmoid has the digits of float32."""

    def loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        s, out = q.new_zeros(2, 3, D, E), []
        for t in range(T):
            s = 0.5 * s + k[:, :, t, :, None] * v[:, :, t, None]
            out.append(weighed(q, s, t) * gate[:, :, t].float().sigmoid())
        return torch.stack(out, 2)

    q, k, v, _, _ = inputs()
    gate = inputs(torch.bfloat16)[2]
    with torch.no_grad():
        got, report = run_compiled(loop, q, k, v, gate, pipeline=BOTH)
        want = loop(q, k, v, gate)
    assert report.ops["linear_attention"] == 1
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def lstm(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """What a step gives, the next one's gates are made of."""
    cell, hidden, out = torch.zeros_like(q[:, :, 0]), torch.zeros_like(q[:, :, 0]), []
    for t in range(T):
        gate = (hidden @ s[0, 0, :, :D] + k[:, :, t]).sigmoid()
        cell = gate * cell + q[:, :, t] * g[:, :, t]
        hidden = gate * cell.tanh()
        out.append(hidden)
    return torch.stack(out, 2)


def residual(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """Layers, and no loop over time."""
    x, out = q, []
    for _ in range(4):
        x = x + x @ s[0, 0, :, :D]
        out.append(x * k)
    return torch.stack(out)


def fed_back(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    y, out = v[:, :, 0], []
    for t in range(T):
        s = 0.5 * s + k[:, :, t, :, None] * y.unsqueeze(-2)
        y = torch.tanh(weighed(q, s, t)) * v[:, :, t]
        out.append(y)
    return torch.stack(out, 2)


def norm(q: Tensor, s: Tensor, z: Tensor, v: Tensor, t: int) -> Tensor:
    y = weighed(q, s, t)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)


def unlike(q: Tensor, s: Tensor, z: Tensor, v: Tensor, t: int) -> Tensor:
    y = weighed(q, s, t)
    return y.sin() if t == 2 else y.cos()


def by_step(q: Tensor, s: Tensor, z: Tensor, v: Tensor, t: int) -> Tensor:
    return weighed(q, s, t).tanh() / (t + 1)


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (lstm, "is also read by"),
        (residual, ""),
        (fed_back, "is also read by"),
        (normalised(norm), "is also read by"),
        (normalised(unlike), ""),
        (normalised(by_step), ""),
    ],
)
def test_what_is_no_work_of_steps_alike_stays(loop: Body, reason: str) -> None:
    """Silently where nothing is to be gained: whoever reads the loop tells what it is not."""
    given = inputs()
    with torch.no_grad():
        got, report = run_compiled(loop, *given, pipeline=NAME)
        want = loop(*given)
    assert report.counts[NAME] == 0
    assert not report.faults
    assert [reason in r.reason for r in report.rejected] == [True] * bool(reason)
    for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_random_calls_stay_in_their_steps() -> None:
    """They draw the numbers that they drew; what follows moves."""
    loop = normalised(lambda q, s, z, v, t: F.dropout(weighed(q, s, t), 0.5) * v[:, :, t])
    given = inputs()
    outs = []
    with torch.no_grad():
        for call in (lambda: run_compiled(loop, *given, pipeline=NAME)[0], lambda: loop(*given)):
            torch.manual_seed(0)
            outs.append(call()[0])
    assert torch.equal(*outs)
