"""Loops over time that only look like linear attention stay as they are, with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.canonicalize.look_alike_loops import (
    all_heads,
    before_and_after,
    constants,
    copied_delta_rule,
    early,
    flat,
    gated,
    keeping,
    later_gates,
    over_chunks,
    over_split_chunks,
    running_maximum,
    summed_and_kept,
    turned_and_kept,
    turned_by_a_matrix,
    vector_gates,
)
from tests.passes.canonicalize.test_recognize_recurrent_attention import NAME, Body, T, inputs, looped
from tests.passes.conftest import run_compiled

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
        looped(lambda s, kv, g, t: (new := s + kv) / new.norm()),
        "depends on the state",
    ),
    "divided by what may be anything": (
        looped(lambda s, kv, g, t: s / g[:, :, t, :, None] + kv),
        "is not known to be in (0, 1]",
    ),
    "divided by less than 1": (
        looped(lambda s, kv, g, t: s / 0.5 + kv),
        "its decay is 2.0: it grows",
    ),
    "drawn to the product by any weight": (
        looped(lambda s, kv, g, t: torch.lerp(s, kv, g[:, :, t, :, None])),
        "is not known to be in (0, 1]",
    ),
    "drawn away from the product": (
        looped(lambda s, kv, g, t: torch.lerp(s, kv, 1.5)),
        "its decay is -0.5: it has no logarithm",
    ),
    "a product of the state": (
        looped(lambda s, kv, g, t: torch.addcmul(s, s, kv)),
        "depends on the state",
    ),
    "a state that is forgotten": (
        flat(lambda s, k, v, g: torch.baddbmm(s, k, v, beta=0)),
        "its decay is 0.0: it has no logarithm",
    ),
    "a sum that is kept": (
        summed_and_kept,
        "is also read by",
    ),
    "a quotient by channels of key and value": (
        looped(lambda s, kv, g, t: torch.addcdiv(s, kv, 1 + kv.square())),
        "no product of a key and a value",
    ),
    "a quotient in 16 bits": (
        looped(lambda s, kv, g, t: s * 0.5 + (kv.half() / (1 + g[:, :, t, :, None].square()).half()).float()),
        "but a quotient: divide the key or the value",
    ),
    "divided by a gate": (
        looped(lambda s, kv, g, t: torch.addcdiv(kv, s, 1 + g[:, :, t, :, None].square())),
        "is not known to be in (0, 1]",
    ),
    "a delta rule of copies": (
        copied_delta_rule,
        "depends on the state, as in a delta rule",
    ),
    "a state that a matrix turns": (
        turned_by_a_matrix,
        "its state goes through aten.matmul.default: only a decay is known, and no matrix",
    ),
    "a state that decays and that a matrix turns": (
        turned_and_kept,
        "only a decay is known, and no matrix, as in a delta rule",
    ),
    "chunks of tokens": (
        over_chunks,
        "its steps take 2 places of",
    ),
    "chunks of their own axis": (
        over_split_chunks,
        "but of matrices: in a loop over chunks, take single tokens",
    ),
    "a delta rule": (
        flat(lambda s, k, v, g: torch.baddbmm(s, k, v - k.mT @ s)),
        "depends on the state",
    ),
    "a product of matrices": (
        flat(lambda s, k, v, g: torch.baddbmm(s, k.expand(-1, -1, 2), v.expand(-1, 2, -1))),
        "no product of a key and a value",
    ),
    "products of all heads": (
        all_heads,
        "no product of a key and a value",
    ),
    "a running maximum": (
        running_maximum,
        "which another step computes besides the state",
    ),
    "the state before and after its update in one read-out": (
        before_and_after,
        "before its own update and after it in one read-out",
    ),
    "a last state that the last step does not update": (
        lambda *x: early(*x, bonus=lambda kv, k: kv, keeps=True),
        "its last step only reads the state",
    ),
    "a bonus that is no product": (
        lambda *x: early(*x, bonus=lambda kv, k: k[..., None].exp()),
        "no product of a key and a value",
    ),
    "gates for all steps but the first": (
        later_gates,
        "has places for the others alone: start from zeros",
    ),
    "a vector with gates of channels": (
        vector_gates,
        "its state is one vector a head: append ones to the value",
    ),
    "a vector that is collected": (
        lambda q, k, v, g, s: vector_gates(q, k, v, g, s, lambda z, q: z),
        "no query is multiplied by them",
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
        looped(lambda s, kv, g, t: s * g[:, :, t, :, None].sigmoid() + kv if t else 2 * kv),
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
        got, report = run_compiled(loop, *given, pipeline=f"{NAME},recognize-selective-scan")
        want = loop(*given)
    assert report.ops["linear_attention"] == 0
    assert not report.faults
    assert any(reason in r.reason for r in report.rejected), [r.reason for r in report.rejected]
    got, want = ([x] if isinstance(x, Tensor) else x for x in (got, want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
