"""Recognise the selective scan in the loop over time that a model writes.

    for t in range(T):                                              y, h = selective_scan(u, delta, a, b, c)
        h = exp(delta * a)[t] * h + (delta * b * u)[t]      =>
        ys.append(h[t] @ c[t])
    y = stack(ys)

Exact: the same sums, in float32 or wider. Decays and inputs may be formed of all steps at once or in each
step, in any order of factors; read-outs by `matmul`, a sum or `einsum`, collected by `stack`, `cat` or
writes; from the first step to the last or back. The loop's length is that of the traced call, as in the
model. No training needed. Saves most of the graph (eight calls a step), and two tensors of [b, d, t, n].

Source: Gu & Dao 2023, arXiv:2312.00752, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph import scan_form
from effopt.graph.analyses.recurrences import Recurrence
from effopt.graph.rewrite import Emit
from effopt.passes.base import Example
from effopt.passes.loop_pass import LoopPass


@dataclass(frozen=True)
class RecognizeSelectiveScan(LoopPass):
    """Whose state is `[b, d, n]`."""

    name: ClassVar[str] = "recognize-selective-scan"

    def tells_of(self, rank: int) -> bool:
        return rank == 3

    def covered(self, found: Recurrence) -> tuple[Node, ...]:
        return scan_form.covered(found)

    def read(self, found: Recurrence) -> Any:
        return scan_form.read(found)

    def write(self, emit: Emit, found: Recurrence, form: Any) -> tuple[Node, Node]:
        return scan_form.write(emit, found, form)

    def samples(self) -> Iterable[Example]:
        yield Example(lambda u, d, a, b, c: _loop(_decay(d, a), _added(u, d, b), c), _inputs())
        yield Example(_scan_from, (*_inputs(), torch.randn(2, 3, 5)))
        yield Example(_in_each_step, _inputs())
        yield Example(_backwards, _inputs())

    def refusals(self) -> Iterable[Example]:
        inputs = _inputs()
        plain = lambda u, d, a, b, c: _loop(d.unsqueeze(-1) + a[:, None], _added(u, d, b), c)  # noqa: E731
        yield Example(plain, inputs, "not an exponential")
        other = lambda u, d, a, b, c: _loop(_decay(d, a), _added(u, d.cos(), b), c)  # noqa: E731
        yield Example(other, inputs, "step length of its decay is not in what it adds")
        bent = lambda u, d, a, b, c: _loop(_decay(d, a), _added(u, d, b), c, torch.tanh)  # noqa: E731
        yield Example(bent, inputs, "its state goes through aten.tanh")
        gaps = lambda u, d, a, b, c: _loop(_decay(d, a), _added(u, d, b), c, steps=(0, 1, 3))  # noqa: E731
        yield Example(gaps, inputs, "not one after the other")
        some = lambda u, d, a, b, c: _loop(_decay(d, a), _added(u, d, b), c, steps=(1, 2, 3))  # noqa: E731
        yield Example(some, inputs, "3 of the 4 places")
        yield Example(lambda *x: _backwards(*x, over=1), inputs, "not over n")
        yield Example(lambda *x: _backwards(*x, cut=torch.int32), inputs, "rounded to torch.int32")
        yield Example(lambda *x: _backwards(*x, cut=torch.float16), inputs, "rounded to torch.float16")
        yield Example(_read_outside, inputs, "is also read by")


def _inputs() -> tuple[Tensor, ...]:
    u, b, c = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    return u, torch.rand(2, 3, 4), -torch.rand(3, 5), b, c


def _decay(delta: Tensor, a: Tensor) -> Tensor:
    return torch.exp(delta.unsqueeze(-1) * a[None, :, None])


def _added(u: Tensor, delta: Tensor, b: Tensor) -> Tensor:
    return delta.unsqueeze(-1) * b.transpose(1, 2)[:, None] * u.unsqueeze(-1)


def _loop(decay: Tensor, added: Tensor, c: Tensor, bend: Any = None, steps: Any = range(4)) -> Tensor:
    h, ys = torch.zeros_like(added[:, :, 0]), []
    for t in steps:
        h = decay[:, :, t] * h + added[:, :, t]
        h = bend(h) if bend is not None else h  # Dynamo 2.11 knows no truth of functions
        ys.append((h @ c[:, :, t].unsqueeze(-1))[:, :, 0])
    return torch.stack(ys, -1)


def _scan_from(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Any) -> tuple[Tensor, Tensor]:
    decay, added, ys = _decay(delta, a), _added(u, delta, b), []
    for t in range(u.shape[2]):
        h = added[:, :, t] + h * decay[:, :, t]
        ys.append(c[:, None, :, t] @ h.mT)
    return torch.cat(ys, 1), h


def _step(h: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, t: int) -> Tensor:
    length = delta[:, :, t, None]
    return torch.exp(length * a) * h + length * u[:, :, t, None] * b[:, None, :, t]


def _in_each_step(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h, out = torch.zeros_like(u[:, :, :1] * a), torch.empty_like(u)
    for t in range(u.shape[2]):
        h = _step(h, u, delta, a, b, t)
        out[:, :, t] = (h * c[:, None, :, t]).sum(-1)
    return out


def _backwards(*given: Tensor, over: int = -1, cut: Any = torch.float32) -> Tensor:
    u, delta, a, b, c = given
    h, ys = torch.zeros_like(u[:, :, :1] * a), []
    for t in reversed(range(u.shape[2])):
        h = _step(h, u, delta, a, b, t)
        ys.append((h.to(cut).to(h.dtype) * c[:, None, :, t]).sum(over, keepdim=True))
    return torch.cat(ys[::-1], over)


def _read_outside(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    h = second = torch.zeros_like(u[:, :, :1] * a)
    ys = []
    for t in range(u.shape[2]):
        h = _step(h, u, delta, a, b, t)
        second = h if t == 1 else second
        ys.append((h * c[:, None, :, t]).sum(-1))
    return torch.stack(ys, -1), second
