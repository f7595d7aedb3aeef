"""Recognise linear attention in the loop over time that a model writes.

    for t in range(T):                                              o, s = linear_attention(q, k, v, decay=g)
        s = exp(g[t]) * s + k[t, :, None] * v[t, None]      =>
        os.append(q[t] @ s)
    o = stack(os)

Exact up to reassociation and intermediate rounding; the state is carried in float32 or wider. The decay is
none, a constant in (0, 1], `exp` of anything or `sigmoid` of anything, one for all, a head, a token or a
channel of the key; a sigmoid is taken as its logarithm. Factors may be formed of all steps at once or in each
step; from the first step to the last or back. The state is a matrix for each head, or a normaliser's vector;
it is read after its update or before it, with a bonus for the step's own key, by one query or several: an op
each. The loop's length is that of the traced call. No training needed. Saves most of the graph (six calls a
step) and the states between chunks of tokens.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, section 3.4; gates: Yang et al. 2023, arXiv:2312.06635,
section 4; a bonus: Peng et al. 2024, arXiv:2404.05892.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph import recurrent_attention_call, recurrent_attention_form
from effopt.graph.analyses.recurrences import Recurrence
from effopt.graph.rewrite import Emit
from effopt.passes.base import Example
from effopt.passes.loop_pass import LoopPass

Step = Callable[..., Any]


@dataclass(frozen=True)
class RecognizeRecurrentAttention(LoopPass):
    """Whose state is a matrix for each head."""

    name: ClassVar[str] = "recognize-recurrent-attention"

    def tells_of(self, rank: int) -> bool:
        return rank != 3

    def covered(self, found: Recurrence) -> tuple[Node, ...]:
        return recurrent_attention_form.covered(found)

    def read(self, found: Recurrence) -> Any:
        return recurrent_attention_form.read(found)

    def write(self, emit: Emit, found: Recurrence, form: Any) -> tuple[Node, ...]:
        return recurrent_attention_call.write(emit, found, form)

    def samples(self) -> Iterable[Example]:
        q, k, v, g = _inputs()
        yield Example(lambda q, k, v: _loop(q, k, v), (q, k, v))
        yield Example(
            lambda q, k, v, g: _loop(q, k, v, lambda t: g[:, :, t, None, None].exp()), (q, k, v, g[..., 0])
        )
        yield Example(
            lambda q, k, v, g: _loop(q, k, v, lambda t: g[:, :, t, :, None].sigmoid()), (q, k, v, g)
        )
        yield Example(_rows, (q, k, v, g[0, :, 0, 0], torch.randn(2, 3, 4, 5)))
        yield Example(lambda q, k, v: _einsums(q[:, 0], k[:, 0], v[:, 0]), (q, k, v))
        yield Example(lambda q, k, v: _loop(q, k, v, read=lambda s, old: old), (q, k, v))
        yield Example(_normaliser, (q, k))

    def refusals(self) -> Iterable[Example]:
        q, k, v, g = _inputs()
        plain = lambda t: g[:, :, t, :, None]  # noqa: E731
        yield Example(lambda q, k, v: _loop(q, k, v, plain), (q, k, v), "is not known to be in (0, 1]")
        yield Example(lambda q, k, v: _loop(q, k, v, lambda t: 1.5), (q, k, v), "1.5: it grows")
        yield Example(lambda q, k, v: _loop(q, k, v, lambda t: -0.5), (q, k, v), "no logarithm")
        by_value = lambda q, k, v: _loop(q, k, v, lambda t: v[:, :, t, None].sigmoid())  # noqa: E731
        yield Example(by_value, (q, k, v), "differs between channels of the value")
        other = lambda q, k, v, g: _loop(q, k, v, lambda t: g[:, :, max(t - 1, 0), :, None].exp())  # noqa: E731
        yield Example(other, (q, k, v, g), "not one after the other")
        yield Example(_delta_rule, (q, k, v), "depends on the state")
        yield Example(lambda q, k, v: _loop(q, k, v, bend=torch.tanh), (q, k, v), "its state goes through")
        both = lambda q, k, v: _loop(q, k, v, read=lambda s, old: s + old)  # noqa: E731
        yield Example(both, (q, k, v), "before its own update and after it")


def _inputs() -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(2, 3, 4, n) for n in (4, 4, 5))
    return q, k, v, -torch.rand(2, 3, 4, 4)


def _loop(
    q: Tensor, k: Tensor, v: Tensor, decay: Step | None = None, bend: Step | None = None, read: Any = None
) -> Tensor:
    # `is not None`: Dynamo 2.11 does not know that a function is true.
    s, out = q.new_zeros(2, 3, 4, 5), []
    for t in range(q.shape[2]):
        old = s
        s = s * decay(t) if decay is not None else s
        s = s + k[:, :, t, :, None] * v[:, :, t, None]
        s = bend(s) if bend is not None else s
        out.append((q[:, :, t, :, None] * (read(s, old) if read is not None else s)).sum(-2))
    return torch.stack(out, 2)


def _normaliser(q: Tensor, k: Tensor) -> Tensor:
    z: Any = 0.0
    out = []
    for t in range(q.shape[2]):
        z = z + k[:, :, t]
        out.append((q[:, :, t] * z).sum(-1))
    return torch.stack(out, -1)


def _rows(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    out = []
    for t in range(q.shape[2]):
        one = slice(t, t + 1)
        s = rate.exp()[:, None, None] * s + k[:, :, one].transpose(-1, -2) @ v[:, :, one]
        out.append(q[:, :, one] * 0.5 @ s)
    return torch.cat(out, 2), s


def _einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = q.new_zeros(2, 5, 4), torch.zeros_like(v)
    for t in range(q.shape[1]):
        s = 0.9 * s + torch.einsum("bk,bv->bvk", k[:, t], v[:, t])
        out[:, t] = torch.einsum("bvk,bk->bv", s, q[:, t])
    return out


def _delta_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = q.new_zeros(2, 3, 4, 5), []
    for t in range(q.shape[2]):
        key = k[:, :, t, :, None]
        s = s + key * (v[:, :, t, None] - (s * key).sum(-2, keepdim=True))
        out.append((q[:, :, t, :, None] * s).sum(-2))
    return torch.stack(out, 2)
