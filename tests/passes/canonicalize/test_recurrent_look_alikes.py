"""Loops over time that only look like linear attention stay as they are, with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.canonicalize.test_recognize_recurrent_attention import NAME, Body, T, inputs, looped
from tests.passes.conftest import run_compiled


def gated(s: Tensor, kv: Tensor, g: Tensor, t: int) -> Tensor:
    return s * g[:, :, t, :, None].sigmoid() + kv


def keeping(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> list[Tensor]:
    kept, out = [], []
    for t in range(T):
        s = gated(s, k[:, :, t, :, None] * v[:, :, t, None], g, t)
        kept.append(s)
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return [torch.stack(out, 2), kept[1]]


def constants(gamma: Tensor, *given: Tensor) -> Any:
    return looped(lambda s, kv, g, t: s * gamma[:, None, None] + kv)(*given)


REFUSED: dict[str, tuple[Body, str]] = {
    "a gate that may be above 1": (
        looped(lambda s, kv, g, t: s * g[:, :, t, :, None].tanh() + kv),
        "is not known to be in (0, 1]: take exp of a logarithm",
    ),
    "a rounded gate": (
        looped(lambda s, kv, g, t: s * g[:, :, t, :, None].sigmoid().half().float() + kv),
        "its decay is rounded to torch.float16",
    ),
    "constants of which one is 0": (
        lambda *x: constants(torch.arange(3.0) / 2, *x),
        "holds numbers that are not in (0, 1]",
    ),
    "a gate of channels of key and value": (
        looped(lambda s, kv, g, t: s * kv.sigmoid() + kv),
        "differs between channels of the value",
    ),
    "rounded products": (
        looped(lambda s, kv, g, t: s * 0.5 + kv.half().float()),
        "what it adds is rounded to torch.float16",
    ),
    "a sum of products": (
        looped(lambda s, kv, g, t: s * 0.5 + (kv + g[:, :, t, :, None])),
        "is no product of a key and a value",
    ),
    "no value": (
        looped(lambda s, kv, g, t: s * 0.5 + g[:, :, t, :, None]),
        "no product of a key and a value",
    ),
    "a rounded result": (
        looped(gated, lambda o, q, s, t: o.bfloat16().float()),
        "its read-out is rounded to torch.bfloat16",
    ),
    "a result gated in the loop": (
        looped(gated, lambda o, q, s, t: o * q[:, :, t, :1]),
        "multiply what is collected, behind the loop",
    ),
    "read by two": (
        looped(gated, lambda o, q, s, t: o + s.sum(-2)),
        "its read-out",
    ),
    "scaled twice": (
        looped(lambda s, kv, g, t: s * g[:, :, t, :, None].sigmoid() * g[:, :, t, :1, None].sigmoid() + kv),
        "multiply the factors first",
    ),
    "a normalised state": (
        looped(lambda s, kv, g, t: (s + kv) / 2.5),
        "its state goes through",
    ),
    "a softmax in each step": (
        looped(lambda s, kv, g, t: s * g[:, :, t].softmax(-1).unsqueeze(-1).exp() + kv),
        "is computed in each step: compute it before the loop",
    ),
    "all but the first token": (
        lambda q, k, v, g, s: looped(lambda s, kv, h, t: s * g[:, :, t + 1, :, None].exp() + kv)(
            q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], g, s
        ),
        "4 of the 5 places",
    ),
    "a query from the other end": (
        lambda q, k, v, g, s: looped(gated, lambda o, q, s, t: (q[:, :, T - 1 - t, None] @ s)[:, :, 0])(
            q, k, v, g, s
        ),
        "in opposite directions",
    ),
    "another first step": (
        looped(lambda s, kv, g, t: s * g[:, :, t, :, None].sigmoid() + kv if t else kv),
        "start from zeros, in the form of the other steps",
    ),
    "a state that is kept": (
        keeping,
        "is also read by",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_look_alikes_are_refused_with_a_reason(name: str) -> None:
    loop, reason = REFUSED[name]
    given = inputs()
    with torch.no_grad():
        got, report = run_compiled(loop, *given, pipeline=NAME)
        want = loop(*given)
    assert report.ops["linear_attention"] == 0
    assert not report.faults
    assert any(reason in r.reason for r in report.rejected), [r.reason for r in report.rejected]
    got, want = ([x] if isinstance(x, Tensor) else x for x in (got, want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
